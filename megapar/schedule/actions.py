"""Actions and schedules as data.

An action is (stage, kind, micro-batch), written `2F0`: stage 2 runs the forward pass of micro-batch 0.

| kind   | what                                    | kind   | what                               |
|--------|-----------------------------------------|--------|------------------------------------|
| F      | forward                                 | SEND_F | send activations to the next stage |
| B      | backward: input and weight gradients    | RECV_F | wait for those of the previous one |
| I      | input gradients only, W follows later   | SEND_B | send gradients to the previous one |
| W      | weight gradients queued by I            | RECV_B | wait for those of the next one     |
| REDUCE | finish the stage's gradient reduction (written `2REDUCE`, no micro-batch)                     |
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

COMPUTE = ("F", "B", "I", "W")
TRANSFERS = ("SEND_F", "RECV_F", "SEND_B", "RECV_B")
KINDS = (*COMPUTE, *TRANSFERS, "REDUCE")

_TEXT = re.compile(r"(\d+)(SEND_F|RECV_F|SEND_B|RECV_B|REDUCE|F|B|I|W)(\d*)")


class ScheduleError(ValueError):
    """A schedule that can't be made, read or run; one line, naming the first offending action where there is one."""


class Action(NamedTuple):
    stage: int
    kind: str
    microbatch: int = 0

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}" + ("" if self.kind == "REDUCE" else str(self.microbatch))

    @classmethod
    def parse(cls, text: str) -> "Action":
        """The inverse of `str`. Raises ScheduleError for anything else."""
        match = _TEXT.fullmatch(text.strip())
        if match is None or (match[2] == "REDUCE") != (match[3] == ""):
            raise ScheduleError(f"{text!r} is no action; an action looks like 2F0 (kinds: {', '.join(KINDS)})")
        return cls(int(match[1]), match[2], int(match[3] or 0))


Row = list[Action]
Rows = list[Row]


@dataclass(frozen=True)
class Schedule:
    """rows[r]: the actions of pipeline rank r in order. A stage lives on the rank whose row has its actions."""

    stages: int
    microbatches: int
    rows: tuple[tuple[Action, ...], ...]

    @cached_property
    def placement(self) -> tuple[int, ...]:
        """The rank of every stage, -1 where no row has an action of it."""
        return tuple(placement(self.rows, self.stages))

    def rank_of(self, stage: int) -> int:
        return self.placement[stage]

    def stages_of(self, rank: int) -> list[int]:
        """The stages of a rank in order."""
        return [stage for stage, owner in enumerate(self.placement) if owner == rank]

    @cached_property
    def transfers(self) -> frozenset[tuple[str, int, int]]:
        """(F or B, source, target) of every pair of ranks that one sends to the other."""
        step = {"SEND_F": 1, "SEND_B": -1}
        return frozenset(
            (action.kind[-1], source, self.placement[action.stage + step[action.kind]])
            for source, row in enumerate(self.rows)
            for action in row
            if action.kind in step
        )

    def channel_order(self, source: int, target: int, kind: str) -> list[Action]:
        """The receives of rank `target` in the order in which rank `source` sends, for kind F or B.

        A channel (source, target, kind) delivers in the order of its sends, so receives are posted in this order. The
        target's row may want the messages in another one: a RECV waits until its own message has arrived, and a message
        that came earlier than it is wanted is kept.
        """
        step, send, receive = (1, "SEND_F", "RECV_F") if kind == "F" else (-1, "SEND_B", "RECV_B")
        return [
            Action(action.stage + step, receive, action.microbatch)
            for action in self.rows[source]
            if action.kind == send and self.placement[action.stage + step] == target
        ]


def placement(rows: Iterable[Iterable[Action]], stages: int) -> list[int]:
    """The rank of every stage: the first whose row has an action of it, -1 for none."""
    ranks = [-1] * stages
    for rank, row in enumerate(rows):
        for stage in {action.stage for action in row}:
            if 0 <= stage < stages and ranks[stage] < 0:
                ranks[stage] = rank
    return ranks


def loop_placement(ranks: int, chunks: int) -> list[int]:
    """Stages dealt out in turn: stage s on rank s % ranks."""
    return [stage % ranks for stage in range(ranks * chunks)]


def v_placement(ranks: int) -> list[int]:
    """Two stages a rank, there and back: stages r and 2 * ranks - 1 - r on rank r. First and last share rank 0."""
    return [*range(ranks), *reversed(range(ranks))]
