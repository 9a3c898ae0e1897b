"""What a schedule is to the rest of megapar: one object in a file of its own in `generators/`.

The file is found by itself: `SCHEDULE = Generator(...)` is all it needs for the configuration, the checker, the
simulator, the tests and the pictures to take it up. docs/howto/add-a-schedule.md does it.
"""

from collections.abc import Callable
from dataclasses import dataclass

from megapar.schedule.actions import Rows
from megapar.schedule.costs import Costs


@dataclass(frozen=True)
class Problem:
    """What a schedule is written for: `ranks` pipeline ranks with `chunks` stages each, and what may steer its order.

    memory_limit: most activation memory of a rank, in units of one micro-batch's on a whole rank
    """

    ranks: int
    microbatches: int
    chunks: int
    costs: Costs
    memory_limit: float = float("inf")

    @property
    def stages(self) -> int:
        return self.ranks * self.chunks


def no_constraint(ranks: int, microbatches: int, chunks: int) -> str | None:
    return None


@dataclass(frozen=True)
class Generator:
    """A schedule's name, its compute actions, and what they ask for.

    name: what `pipeline.schedule` takes; about: one line, which `megapar schedule` shows
    build: the compute actions (F, B, I, W) of every rank; transfers and reductions are added by `lower`
    chunks: the stages per rank that it takes; the first is its default
    refuse: (ranks, microbatches, chunks) -> why not, in one line that says what would do; None if it can
    searches: it takes seconds, so a process builds each once, and what starts ranks hands them the rows
    """

    name: str
    about: str
    build: Callable[[Problem], Rows]
    chunks: range = range(1, 2)
    refuse: Callable[[int, int, int], str | None] = no_constraint
    searches: bool = False
