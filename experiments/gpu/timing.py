"""A kernel's time beside others' and beside what the card can do."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from experiments.gpu.run import Run, first_line

Call = Callable[[], object]


@dataclass(frozen=True)
class Timed:
    """What is timed, and what is asked of it.

    work: of a call, in 1e9 FLOPs (unit TFLOP/s) or in 1e9 bytes (unit GB/s)
    others: name -> (call, least ratio of our rate to its, None: it is only shown)
    ceiling: what the card can do, in the unit; share: of it, or of the named one of `others`, that is asked for
    """

    check: str
    work: float
    unit: str
    ours: Call
    others: dict[str, tuple[Call, float | None]] = field(default_factory=dict)
    ceiling: float = math.nan
    share: float | None = None
    of: str = ""


def beside(run: Run, timed: Timed) -> None:
    """A row of our rate, and one of its ratio to each other's."""
    run.attempt(timed.check, measure, run, timed)


def measure(run: Run, timed: Timed) -> None:
    scale = 1.0 if timed.unit == "TFLOP/s" else 1e3
    mine = run.bench(timed.ours)
    rate = scale * timed.work / mine
    parts, rates = [f"{mine:.3f} ms", f"{rate / timed.ceiling:.2f} of ceiling"], {}
    for name, (call, least) in timed.others.items():
        try:
            theirs = run.bench(call)
        except Exception as error:
            run.skip(f"{timed.check} beside {name}", f"torch can't run it here: {first_line(error)}")
            continue
        parts.append(f"{name} {theirs:.3f}")
        rates[name] = scale * timed.work / theirs, least
    asked = rates.get(timed.of, (timed.ceiling, None))[0]
    run.rate(timed.check, rate, timed.unit, None if timed.share is None else timed.share * asked, ", ".join(parts))
    for name, (other, least) in rates.items():
        run.rate(f"{timed.check} beside {name}", rate / other, "x", least)
