"""Checkpoints: every `checkpoint.every` steps, every `checkpoint.every_minutes`, and after the last step."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from megapar.parallel.agreement import all_say
from megapar.train.hooks.hook import Hook
from megapar.train.trainer import Step

if TYPE_CHECKING:
    from megapar.train.loop import Loop


class Save(Hook):
    """clock: seconds that only go forward; rank 0's counts."""

    order = 30

    def __init__(self, loop: "Loop", clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(loop)
        self.clock = clock

    def start(self) -> None:
        self._saved = self.clock()

    def after(self, step: int, done: Step) -> None:
        loop, config = self.loop, self.loop.config.checkpoint
        last = step == loop.config.train.steps
        due = last or (config.every and step % config.every == 0) or (config.every_minutes and self._time_is_up())
        with loop.saver.kept_going(loop.config, loop.writer):
            (loop.saver.settle if due else loop.saver.look)()
        if due:
            loop.settle()
            if last:
                loop.save(step)
                return
            with loop.saver.kept_going(loop.config, loop.writer):
                loop.save(step, wait=not config.async_save)
            self._saved = self.clock()

    def _time_is_up(self) -> bool:
        """The same on all ranks. Collective."""
        mesh = self.loop.trainer.mesh
        over = self.clock() - self._saved >= 60 * self.loop.config.checkpoint.every_minutes
        return all_say(mesh.rank != 0 or over, mesh)


HOOK = Save
