"""Checkpoints: every `checkpoint.every` steps and after the last one."""

from megapar.train.hooks.hook import Hook
from megapar.train.trainer import Step


class Save(Hook):
    order = 30

    def after(self, step: int, done: Step) -> None:
        every = self.loop.config.checkpoint.every
        if step == self.loop.config.train.steps or (every and step % every == 0):
            self.loop.settle()
            self.loop.save(step)


HOOK = Save
