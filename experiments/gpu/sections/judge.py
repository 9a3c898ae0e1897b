"""Whether this run can say no: outputs that are known to be wrong, and checks that can't be made."""

import math
from pathlib import Path

import torch
from torch import Tensor

from experiments.gpu.compare import BOUNDS, distance, judge
from experiments.gpu.run import Run
from experiments.gpu.section import Section
from experiments.gpu.table import Row, word_of

FACTOR = 1.001  # the least scaling that must be seen in fp32


def judged(run: Run) -> None:
    exact = torch.linspace(-2.0, 3.0, 64, dtype=torch.float64, device=run.device).view(8, 8)
    right = exact.float()
    hidden = exact.masked_fill(exact > 2.5, math.inf)
    wrong = {
        "scaled by 1.001": right * FACTOR,
        "one NaN": right.index_put((torch.tensor(3), torch.tensor(4)), torch.tensor(math.nan, device=run.device)),
        "another shape": right[:7],
    }
    run.row("right output", told(run, [right], exact) == ["ok"])
    for name, out in wrong.items():
        run.row(name, told(run, [out], exact) == ["WRONG"])
    run.row("infinities elsewhere", distance(right, hidden) == math.inf and distance(hidden.float(), hidden) < 1e-6)
    run.row("row by row", distance(right, lambda first, last: exact[first:last], 3) < 1e-6)
    other = right.clone()
    other[0, 0] = torch.nextafter(other[0, 0], other[0, 1])
    run.row("other bits the second time", told(run, [right, other], exact) == ["WRONG", "ok"])
    run.row("less exact than torch", told(run, [right * (1 + 1e-6)], exact, right)[-1] == "ok")
    failures(run)


def told(run: Run, outs: list[Tensor], exact: Tensor, plain: Tensor | None = None) -> list[str]:
    """The words of the rows that these outputs of a call make."""
    rows = list[Row]()
    scratch = Run("judge", Path(run.out), 60, run.device, run.seed, {}, rows.append)

    def torch_s() -> dict[str, Tensor]:
        assert plain is not None, "torch can't do it"
        return {"y": plain}

    judge(scratch, "known", [{"y": out} for out in outs], {"y": exact}, BOUNDS["fp32"], torch_s)
    return [word_of(row) for row in rows]


def failures(run: Run) -> None:
    """A check that raises is wrong, one whose package isn't installed is skipped, and so is one without time."""
    rows = list[Row]()
    scratch = Run("judge", Path(run.out), 60, run.device, run.seed, {}, rows.append)

    def raises(error: Exception) -> None:
        raise error

    scratch.attempt("error", raises, ValueError("no\nsuch thing"))
    scratch.attempt("package", raises, ModuleNotFoundError("No module named 'absent'", name="absent"))
    scratch.attempt("moved", raises, ModuleNotFoundError("No module named 'megapar.absent'", name="megapar.absent"))
    scratch.end = 0.0
    scratch.attempt("late", raises, ValueError())
    run.row("checks that fail", [word_of(row) for row in rows] == ["WRONG", "skip", "WRONG", "skip"])


SECTION = Section("judge", wave=1, seconds=20, run=judged)
