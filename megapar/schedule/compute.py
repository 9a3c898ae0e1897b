"""Whether rows of computations can be a training step, in the words of whoever wrote them: no transfers yet."""

from collections.abc import Sequence

from megapar.schedule.actions import Action, Row, ScheduleError, placement


def check_rows(rows: Sequence[Row], stages: int, microbatches: int) -> None:
    """Raise ScheduleError, naming row and computation, unless every rank has a stage, every stage does the forward and
    the backward of every micro-batch once, after what it needs, and no row waits for ever.

    `check` proves the whole schedule later; its words are those of transfers that a table's author never wrote.
    """
    replay = _Rows(rows, stages)
    replay.run()
    replay.refuse_missing(microbatches)
    replay.refuse_circle()


class _Rows:
    def __init__(self, rows: Sequence[Row], stages: int) -> None:
        self.rows, self.stages, self.ranks = rows, stages, placement(rows, stages)
        if -1 in self.ranks:
            raise ScheduleError(f"stage {self.ranks.index(-1)}: no row has it")
        if [] in rows:
            raise ScheduleError(f"row {rows.index([])}: no computation; every rank needs a stage")
        self.position = [0] * len(rows)
        self.done: set[Action] = set()  # a whole backward counts as its I and its W, too

    def run(self) -> None:
        moved = True
        while moved:
            moved = False
            for rank, row in enumerate(self.rows):
                while self.position[rank] < len(row) and self._passes(rank, row[self.position[rank]]):
                    self.position[rank] += 1
                    moved = True

    def _passes(self, rank: int, action: Action) -> bool:
        """Do an action; False where it waits for another row. Raises ScheduleError for one that never can be done."""
        stage, kind, m = action
        if self.ranks[stage] != rank:
            self._refuse(rank, f"stage {stage} is in row {self.ranks[stage]}")
        if Action(stage, "I" if kind == "B" else kind, m) in self.done:
            self._refuse(rank, "a second time" if kind in ("F", "W") else "a second backward of this micro-batch")
        own = {"B": "F", "I": "F", "W": "I"}.get(kind)
        if own and Action(stage, own, m) not in self.done:
            self._refuse(rank, f"before {Action(stage, own, m)}")
        if (needed := self._needs(action)) is not None and needed not in self.done:
            if self.ranks[needed.stage] == rank:
                self._refuse(rank, f"before {_shown(needed)}")
            return False
        self.done |= {Action(stage, each, m) for each in ("BIW" if kind == "B" else kind)}
        return True

    def _needs(self, action: Action) -> Action | None:
        """The computation of a neighbouring stage that comes first."""
        stage, kind, m = action
        if kind == "F":
            return Action(stage - 1, "F", m) if stage else None
        return Action(stage + 1, "I", m) if kind != "W" and stage + 1 < self.stages else None

    def refuse_missing(self, microbatches: int) -> None:
        written = {action for row in self.rows for action in row}
        for stage, rank in enumerate(self.ranks):
            for m in range(microbatches):
                if Action(stage, "F", m) not in written:
                    raise ScheduleError(f"row {rank}: {Action(stage, 'F', m)} is missing")
                whole, inputs, weights = (Action(stage, kind, m) in written for kind in "BIW")
                if not whole and not (inputs and weights):
                    missing = Action(stage, "W" if inputs else "I" if weights else "B", m)
                    raise ScheduleError(f"row {rank}: {missing} is missing")

    def refuse_circle(self) -> None:
        stuck = [(rank, row[at:]) for rank, (row, at) in enumerate(zip(self.rows, self.position, strict=True))]
        waits = [f"row {rank} at {row[0]} for {_shown(self._needs(row[0]))}" for rank, row in stuck if row]
        if waits:
            raise ScheduleError(f"every row waits for another: {', '.join(waits)}")

    def _refuse(self, rank: int, problem: str) -> None:
        at = self.position[rank]
        raise ScheduleError(f"row {rank}, computation {at}, {self.rows[rank][at]}: {problem}")


def _shown(needed: Action | None) -> str:
    """A backward of either kind."""
    if needed is None:
        return "nothing"
    return f"the backward of {needed.microbatch} on stage {needed.stage}" if needed.kind == "I" else str(needed)
