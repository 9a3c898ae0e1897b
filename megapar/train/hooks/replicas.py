"""Copies of parameters that must be equal are compared every `run.replicas_every` steps, and before each save."""

from typing import TYPE_CHECKING

from megapar.config.schema import TrainConfig
from megapar.train.hooks.hook import Hook
from megapar.train.rollback import refuse_unequal_replicas
from megapar.train.trainer import Step

if TYPE_CHECKING:
    from megapar.train.loop import Loop


class Replicas(Hook):
    order = 17

    @classmethod
    def wanted(cls, config: TrainConfig) -> bool:
        return config.run.replicas_every > 0 and config.parallel.layout.world > 1

    def __init__(self, loop: "Loop") -> None:
        super().__init__(loop)
        parallel = loop.config.parallel
        # With ZeRO-1 an update overwrites all copies with one: those that gradients came from are there before it.
        self.before_update = parallel.zero > 0 and parallel.layout.over("samples") > 1

    def on_reduced(self, step: int) -> None:
        """Raises RollBack, on all ranks alike, if copies differ."""
        self._compare(step, self.before_update)

    def after(self, step: int, done: Step) -> None:
        """The same."""
        self._compare(step, not self.before_update)

    def _compare(self, step: int, now: bool) -> None:
        if now and step % self.loop.config.run.replicas_every == 0:
            refuse_unequal_replicas(self.loop.trainer, step)


HOOK = Replicas
