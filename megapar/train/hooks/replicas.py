"""Copies of parameters that must be equal are compared every `run.replicas_every` steps, before a state is saved."""

from megapar.config.schema import TrainConfig
from megapar.parallel.replicas import unequal_replicas
from megapar.train.hooks.hook import Hook
from megapar.train.rollback import RollBack
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
        trainer = self.loop.trainer
        buffers = [trainer.buffers] if trainer.frozen is None else [trainer.buffers, trainer.frozen]
        if unequal := unequal_replicas(buffers, trainer.mesh):
            more = f" (and {len(unequal) - 1} more)" if len(unequal) > 1 else ""
            problem = f"step {step}: copies of a parameter differ: {unequal[0].text}{more}"
            raise RollBack(f"{problem}; test that machine, and go back to the newest checkpoint: the same command does")


HOOK = Replicas
