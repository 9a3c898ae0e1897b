"""What a rank did when: spans of time, by kind."""

from collections.abc import Sequence
from dataclasses import dataclass

BUSY = ("F", "B", "I", "W", "REDUCE")
LAYERS = "layers"
FLIGHT = "in flight"
IDLE = "idle"


def layers_of(stage: int) -> str:
    """The name of a span around a stage's layers in its F, without embedding and head."""
    return f"layers of stage {stage}"


def stage_of_layers(name: str) -> int:
    return int(name.rsplit(" ", 1)[1])


@dataclass(frozen=True)
class Span:
    """kind: an action (F, B, I, W, REDUCE, ...), an axis (`tp`, `dp`, `pp`: waiting for it), LAYERS (their part
    of an F), `phase` (the schedule's walk), OPTIMIZER, `matmul` (a piece of one), FLIGHT (an asynchronous collective,
    from its start until it is over) or IDLE (of a GPU: between two marks of the host, at the second of which it had no
    more work; how long it was idle in there is not known, at most all of it). Matmuls and FLIGHT in detail only.

    start and stop in seconds on this rank's clock. Spans nest: an F holds the tp waits inside it.
    """

    kind: str
    name: str
    start: float
    stop: float

    @property
    def seconds(self) -> float:
        return self.stop - self.start


def clock_shifts(meetings: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """How far every rank's clock is ahead of rank 0's, and by how much that may be wrong, in seconds.

    meetings[r]: (start, stop) on rank r's clock of collectives that no rank leaves before all have come; the same ones
    on every rank. A rank's stop is after rank 0's start and its start before rank 0's stop, so each meeting bounds the
    shift from both sides. The narrowest bounds of all meetings count (Cristian 1989, Probabilistic clock
    synchronization).
    """
    shifts = [(0.0, 0.0)]
    for mine in meetings[1:]:
        pairs = list(zip(mine, meetings[0], strict=True))
        low = max(start - stop_0 for (start, _), (_, stop_0) in pairs)
        high = min(stop - start_0 for (_, stop), (start_0, _) in pairs)
        shifts.append(((low + high) / 2, (high - low) / 2))
    return shifts
