"""Silent corruption: every `run.recheck_every` steps gradients are computed twice and compared bit for bit."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from megapar.config.schema import TrainConfig
from megapar.pipeline.stage import Batch
from megapar.train.hooks.hook import Hook, Seen
from megapar.train.recheck import Fault, checked_gradients

if TYPE_CHECKING:
    from megapar.train.loop import Loop


class Recheck(Hook):
    order = 13

    def __init__(self, loop: "Loop") -> None:
        super().__init__(loop)
        self.found: dict[int, Fault] = {}  # by step
        self.faults = 0

    @classmethod
    def wanted(cls, config: TrainConfig) -> bool:
        return config.run.recheck_every > 0

    def before(self, step: int) -> None:
        trainer = self.loop.trainer
        trainer.compute = trainer.gradients
        if step % self.loop.config.run.recheck_every == 0:
            trainer.compute = lambda batches: self._checked(batches, step)

    def _checked(self, batches: Sequence[Batch], step: int) -> list[Tensor]:
        losses, fault = checked_gradients(self.loop.trainer, batches, step)
        if fault is not None:
            self.found[step] = fault
        return losses

    def read(self, seen: Seen) -> dict[str, Any]:
        if (fault := self.found.pop(seen.step, None)) is None:
            return {}
        self.faults += 1
        if self.loop.writer is not None:
            said = "computed twice, gradients differed; a third time decided"
            self.loop.writer.say(f"step {seen.step:>6}  {said}: {fault.text}")
        return {"recheck": {"ranks": fault.ranks, "where": fault.where}}

    def finish(self) -> dict[str, Any]:
        """recheck_faults: checked steps, of this start, whose two computations differed."""
        return {"recheck_faults": self.faults}


HOOK = Recheck
