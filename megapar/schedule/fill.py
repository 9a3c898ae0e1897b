"""Where weight gradients go: into the gaps of a given order of F and I, as memory allows.

The idea of zero-bubble schedules (Qi et al. 2023, "Zero Bubble Pipeline Parallelism"): no one waits for W, so it runs
when its rank would stand still. A schedule then is an order of F and I, and a limit.
"""

from collections import deque
from collections.abc import Sequence

from megapar.schedule.actions import Action, Row, Rows
from megapar.schedule.costs import Costs

# Rounding of sums of costs must not close a gap that fits exactly.
_ROUNDING = 1e-9


def fill_weights(rows: Sequence[Row], placement: Sequence[int], costs: Costs, limit: Sequence[float]) -> Rows:
    """Put a W for every I into rows of F and I, without changing their order.

    A W runs, oldest first, where the next action has to wait for at least as long, and where an F would take the rank's
    memory above limit[rank] (in the costs' unit); the rest at the end. A limit below what the order itself holds with
    every W right after its I can't be kept. Time linear in the actions; the order must not deadlock.
    """
    filler = _Filler(rows, placement, costs, limit)
    ready = list(range(len(rows)))
    while ready:
        filler.advance(ready.pop(), ready)
    assert all(filler.position[rank] == len(row) for rank, row in enumerate(rows)), "the order of F and I deadlocks"
    return filler.filled


class _Filler:
    def __init__(self, rows: Sequence[Row], placement: Sequence[int], costs: Costs, limit: Sequence[float]) -> None:
        self.rows, self.placement, self.costs, self.limit = rows, placement, costs, limit
        self.filled: Rows = [[] for _ in rows]
        self.position, self.clock, self.held = [0] * len(rows), [0.0] * len(rows), [0.0] * len(rows)
        self.end: dict[tuple[int, str, int], float] = {}
        self.waiting: dict[tuple[int, str, int], int] = {}
        self.queued: list[deque[Action]] = [deque() for _ in rows]

    def advance(self, rank: int, ready: list[int]) -> None:
        """Run a rank until it waits for something not yet done; append the ranks that it wakes."""
        row, filled, costs = self.rows[rank], self.filled[rank], self.costs
        last = costs.stages - 1
        while self.position[rank] < len(row):
            action = row[self.position[rank]]
            stage, kind, m = action
            needed = None
            if kind == "F" and stage > 0:
                needed = (stage - 1, "F", m)
            elif kind == "I" and stage < last:
                needed = (stage + 1, "I", m)
            start = 0.0
            if needed is not None:
                if needed not in self.end:
                    self.waiting[needed] = rank
                    return
                start = self.end[needed]
                if self.placement[needed[0]] != rank:
                    start += costs.latency + costs.transfer
            while (queued := self.queued[rank]) and (
                self.clock[rank] + costs.weight_grad[queued[0].stage] <= start + _ROUNDING
                or (kind == "F" and self.held[rank] + costs.activation[stage] > self.limit[rank] + _ROUNDING)
            ):
                self._weight(rank)
            filled.append(action)
            duration = costs.forward[stage] if kind == "F" else costs.input_grad[stage]
            self.clock[rank] = max(self.clock[rank], start) + duration
            self.end[action] = self.clock[rank]
            if kind == "F":
                self.held[rank] += costs.activation[stage]
            else:
                self.held[rank] -= (1 - costs.kept) * costs.activation[stage]
                self.queued[rank].append(Action(stage, "W", m))
            if (waiter := self.waiting.pop(action, None)) is not None:
                ready.append(waiter)
            self.position[rank] += 1
        while self.queued[rank]:
            self._weight(rank)

    def _weight(self, rank: int) -> None:
        action = self.queued[rank].popleft()
        self.filled[rank].append(action)
        self.clock[rank] += self.costs.weight_grad[action.stage]
        self.held[rank] -= self.costs.kept * self.costs.activation[action.stage]
