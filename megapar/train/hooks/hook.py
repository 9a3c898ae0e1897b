"""What a hook is to the loop."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from megapar.config.schema import TrainConfig

if TYPE_CHECKING:
    from megapar.train.loop import Loop
    from megapar.train.trainer import Step


@dataclass(frozen=True)
class Seen:
    """A step's figures, the same on all ranks. loss: of the global batch; figures: of every rank, see `metrics.py`."""

    step: int
    loss: float
    grad_norm: float
    skipped: bool
    figures: Tensor


class Hook:
    """One thing that happens around the steps of a run, on every rank alike; each method may be collective.

    order: of hooks behind a step, the smallest first; those before a step come in the opposite order
    """

    order: ClassVar[int]

    def __init__(self, loop: "Loop") -> None:
        self.loop = loop

    @classmethod
    def wanted(cls, config: TrainConfig) -> bool:
        """Whether a run with this config has it."""
        return True

    def start(self) -> None:
        """Before the first step."""

    def before(self, step: int) -> None:
        """Before a step."""

    def on_reduced(self, step: int) -> None:
        """In a step, with the gradients reduced and not yet clipped."""

    def after(self, step: int, done: "Step") -> None:
        """After a step. On a GPU it may be under way yet: to look at its figures waits for its end."""

    def read(self, seen: Seen) -> Mapping[str, Any]:
        """Once per step, with its figures known, on a GPU while the next step is under way: what it adds to the row."""
        return {}

    def settle(self) -> None:
        """Look at the figures of the steps so far, and do what is left to do with them; see `Loop.settle`."""

    def moved(self) -> None:
        """The loop has another config and trainer from now on: layers have moved to other stages."""

    def finish(self) -> Mapping[str, Any]:
        """After the last step: what it adds to the run's summary."""
        return {}
