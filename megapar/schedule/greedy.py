"""A list scheduler: the order of a schedule from costs and a memory limit, one decision at a time.

Ranks act in the order in which they become free. A free rank takes I before F before W, of what has arrived and fits.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from megapar.schedule.actions import Action, Rows
from megapar.schedule.costs import Costs

_ROUNDING = 1e-9


@dataclass(frozen=True)
class Policy:
    """depth_first: F of the rank's last stage that has one goes first, else of its first
    patience: a W is put off if something more urgent arrives within this share of its time
    """

    depth_first: bool
    patience: float


def list_schedule(placement: Sequence[int], microbatches: int, costs: Costs, limit: float, policy: Policy) -> Rows:
    """Rows of F, I and W for stages on the ranks of `placement`, no rank above `limit` of memory (the costs' unit).

    An F leaves room for one micro-batch on every later stage of its rank. So the last stages can always go on, then the
    ones before them, and it can't deadlock; `limit` must hold one micro-batch on all stages of any rank.
    """
    scheduler = _Scheduler(placement, microbatches, costs, limit, policy)
    scheduler.run()
    return scheduler.rows


class _Scheduler:
    def __init__(self, placement: Sequence[int], microbatches: int, costs: Costs, limit: float, policy: Policy) -> None:
        ranks = max(placement) + 1
        self.placement, self.costs, self.policy = placement, costs, policy
        self.last = len(placement) - 1
        self.rows: Rows = [[] for _ in range(ranks)]
        self.clock, self.held = [0.0] * ranks, [0.0] * ranks
        self.events: list[tuple[float, int]] = [(0.0, rank) for rank in range(ranks)]
        # What a rank will have: (arrival, a running number, action); then what it has, by kind.
        self.coming: list[list[tuple[float, int, Action]]] = [[] for _ in range(ranks)]
        self.number = 0
        self.inputs: list[deque[Action]] = [deque() for _ in range(ranks)]
        self.weights: list[deque[Action]] = [deque() for _ in range(ranks)]
        self.forwards: list[deque[Action]] = [deque() for _ in placement]
        self.stages = [[stage for stage, owner in enumerate(placement) if owner == rank] for rank in range(ranks)]
        # Most memory that a rank may hold for an F of the stage to go ahead.
        self.room = [0.0] * len(placement)
        for stages in self.stages:
            reserved = 0.0
            for stage in reversed(stages):
                reserved += costs.activation[stage]
                self.room[stage] = limit - reserved + _ROUNDING
        if policy.depth_first:
            self.stages = [stages[::-1] for stages in self.stages]
        self.forwards[0].extend(Action(0, "F", m) for m in range(microbatches))

    def run(self) -> None:
        while self.events:
            now, rank = heappop(self.events)
            if now < self.clock[rank]:  # woken by an arrival while it was busy; another event stands at its clock
                continue
            coming = self.coming[rank]
            while coming and coming[0][0] <= now + _ROUNDING:
                arrived = heappop(coming)[2]
                (self.inputs[rank] if arrived.kind == "I" else self.forwards[arrived.stage]).append(arrived)
            action = self._choose(rank, now)
            if action is None:
                if coming:
                    heappush(self.events, (coming[0][0], rank))
                continue
            self._do(rank, action, now)

    def _choose(self, rank: int, now: float) -> Action | None:
        if self.inputs[rank]:
            return self.inputs[rank].popleft()
        blocked = False
        for stage in self.stages[rank]:
            if self.forwards[stage]:
                if self.held[rank] <= self.room[stage]:
                    return self.forwards[stage].popleft()
                blocked = True
        weights = self.weights[rank]
        if not weights:
            return None
        if not blocked and self.coming[rank]:
            wait = self.coming[rank][0][0] - now
            if wait < self.policy.patience * self.costs.weight_grad[weights[0].stage] - _ROUNDING:
                return None
        return weights.popleft()

    def _do(self, rank: int, action: Action, now: float) -> None:
        stage, kind, m = action
        costs = self.costs
        self.rows[rank].append(action)
        if kind == "F":
            end = now + costs.forward[stage]
            self.held[rank] += costs.activation[stage]
            if stage == self.last:
                self._arrives(rank, end, Action(stage, "I", m))
            else:
                self._send(rank, end, Action(stage + 1, "F", m))
        elif kind == "I":
            end = now + costs.input_grad[stage]
            self.held[rank] -= (1 - costs.kept) * costs.activation[stage]
            self.weights[rank].append(Action(stage, "W", m))
            if stage:
                self._send(rank, end, Action(stage - 1, "I", m))
        else:
            end = now + costs.weight_grad[stage]
            self.held[rank] -= costs.kept * costs.activation[stage]
        self.clock[rank] = end
        heappush(self.events, (end, rank))

    def _send(self, rank: int, end: float, action: Action) -> None:
        target = self.placement[action.stage]
        self._arrives(target, end if target == rank else end + self.costs.latency + self.costs.transfer, action)

    def _arrives(self, rank: int, when: float, action: Action) -> None:
        self.number += 1
        heappush(self.coming[rank], (when, self.number, action))
        heappush(self.events, (when, rank))
