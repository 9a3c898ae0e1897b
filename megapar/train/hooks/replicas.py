"""Copies of parameters that must be equal are compared every `run.replicas_every` steps, and before each save."""

from megapar.config.schema import TrainConfig
from megapar.train.hooks.hook import Hook
from megapar.train.rollback import refuse_unequal_replicas
from megapar.train.trainer import Step


class Replicas(Hook):
    order = 17

    @classmethod
    def wanted(cls, config: TrainConfig) -> bool:
        return config.run.replicas_every > 0 and config.parallel.layout.world > 1

    def after(self, step: int, done: Step) -> None:
        """Raises RollBack, on all ranks alike, if copies differ."""
        if step % self.loop.config.run.replicas_every:
            return
        refuse_unequal_replicas(self.loop.trainer, step)


HOOK = Replicas
