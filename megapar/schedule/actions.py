"""Actions and schedules as data.

An action is (stage, kind, micro-batch), written `2F0`: stage 2 runs the forward pass of micro-batch 0.

| kind   | what                                    | kind   | what                               |
|--------|-----------------------------------------|--------|------------------------------------|
| F      | forward                                 | SEND_F | send activations to the next stage |
| B      | backward: input and weight gradients    | RECV_F | receive them from the previous one |
| I      | input gradients only, W follows later   | SEND_B | send gradients to the previous one |
| W      | weight gradients queued by I            | RECV_B | receive them from the next one     |
| REDUCE | finish the stage's gradient reduction (written `2REDUCE`, no micro-batch)                     |
"""

import re
from dataclasses import dataclass

COMPUTE = ("F", "B", "I", "W")
TRANSFERS = ("SEND_F", "RECV_F", "SEND_B", "RECV_B")
KINDS = (*COMPUTE, *TRANSFERS, "REDUCE")

_TEXT = re.compile(r"(\d+)(SEND_F|RECV_F|SEND_B|RECV_B|REDUCE|F|B|I|W)(\d*)")


@dataclass(frozen=True, slots=True)
class Action:
    stage: int
    kind: str
    microbatch: int = 0

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}" + ("" if self.kind == "REDUCE" else str(self.microbatch))

    @classmethod
    def parse(cls, text: str) -> "Action":
        """The inverse of `str`. Raises ValueError for anything else."""
        match = _TEXT.fullmatch(text.strip())
        if match is None or (match[2] == "REDUCE") != (match[3] == ""):
            raise ValueError(f"{text!r} is no action; an action looks like 2F0 (kinds: {', '.join(KINDS)})")
        return cls(int(match[1]), match[2], int(match[3] or 0))


@dataclass(frozen=True)
class Schedule:
    """rows[r]: the actions of pipeline rank r in order. Stage s lives on rank `s % len(rows)`."""

    stages: int
    microbatches: int
    rows: tuple[tuple[Action, ...], ...]

    def rank_of(self, stage: int) -> int:
        return stage % len(self.rows)
