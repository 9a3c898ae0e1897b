"""What may be broken on purpose, and where: `fault.plan`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megapar.config.errors import ConfigError
from megapar.config.keys import option
from megapar.config.layout import RANK_ORDER

# Where a fault strikes: at the beginning of an operation of these kinds, as a rank's timeline names them.
PHASES: dict[str, tuple[str, ...]] = {
    "fwd": ("F",),
    "bwd": ("B", "I", "W"),
    "p2p": ("SEND_F", "RECV_F", "SEND_B", "RECV_B"),
    "collective": (*RANK_ORDER, "world"),
    "reduce": ("REDUCE",),
    "opt": ("OPTIMIZER",),
    "data": ("data",),
    "save": ("save",),
}
KINDS = {
    "sigkill": "the rank is killed from outside",
    "sigstop": "the rank is stopped",
    "segv": "the rank ends by a segmentation fault",
    "exit": "the rank exits without a word",
    "exception": "an exception",
    "hang": "the rank sleeps, and its threads run",
    "gil": "the rank sleeps, and nothing of Python runs in it",
    "delay": "the rank sleeps for `seconds`",
    "ask": "the rank asks all to stop, as a signal to it would",
    "desync": "a collective that no other rank takes part in",
    "disk_full": "a file can't be written",
    "nonfinite": "a gradient that is not a number",
    "flip_file": "one bit of a file of the newest checkpoint",
    "flip_memory": "one bit of a parameter",
    "flip_message": "one bit of what the next all-reduce gives this rank",
    "flip_matmul": "one bit of what the next matmul gives this rank",
}
ONLY = {"nonfinite": ("opt",)}  # earlier, gradients are still to be written
MOST_S = 1e9
FIELDS = ("rank", "step", "phase", "kind", "nth", "point", "seconds")


@dataclass(frozen=True)
class Fault:
    """A fault, which strikes once in a run.

    point: a part of the operation's name; nth: of the operations of this phase in the step that have it, from 0;
    seconds: of a delay
    """

    rank: int
    step: int
    phase: str
    kind: str
    nth: int = 0
    point: str = ""
    seconds: float = 1.0


@dataclass(frozen=True)
class FaultConfig:
    """What is broken on purpose, for tests."""

    plan: list[dict[str, int | float | str]] | None = option(
        None,
        "faults, once each, such as [{rank: 1, step: 3, phase: bwd, kind: sigkill}]; see docs/reliability.md",
        identity=False,
    )


def faults(plan: Sequence[Mapping[str, Any]] | None, ranks: int | None = None) -> list[Fault]:
    """The faults of `fault.plan`. Raises ConfigError for what is none. ranks: of the run; None: not known."""
    return [_fault(index, dict(entry), ranks) for index, entry in enumerate(plan or [])]


def _fault(index: int, entry: dict[str, Any], ranks: int | None) -> Fault:
    def refuse(problem: str) -> ConfigError:
        return ConfigError("fault.plan", entry, f"entry {index}: {problem}")

    unknown = [name for name in entry if name not in FIELDS]
    missing = [name for name in FIELDS[:4] if name not in entry]
    if unknown or missing:
        problem = f"has {unknown[0]!r}; may have" if unknown else f"lacks {missing[0]!r}; give"
        raise refuse(f"{problem} {', '.join(FIELDS if unknown else FIELDS[:4])}")
    if entry["kind"] not in KINDS:
        raise refuse(f"no such kind; use {', '.join(KINDS)}")
    if entry["phase"] not in PHASES:
        raise refuse(f"no such phase; use {', '.join(PHASES)}")
    for name, least in (("rank", 0), ("step", 1), ("nth", 0)):
        value = entry.get(name, least)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise refuse(f"{name} must be a whole number of at least {least}")
    seconds = entry.get("seconds", 0)
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < MOST_S:
        raise refuse("seconds must be a number of at least 0")
    if not isinstance(entry.get("point", ""), str):
        raise refuse("point must be a part of an operation's name")
    if (phases := ONLY.get(entry["kind"])) and entry["phase"] not in phases:
        raise refuse(f"{entry['kind']} would change nothing there; use phase {' or '.join(phases)}")
    if ranks is not None and entry["rank"] >= ranks:
        raise refuse(f"there is no rank {entry['rank']} among {ranks}")
    return Fault(**entry)
