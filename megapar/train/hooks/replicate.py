"""A copy of the state in the launcher's shared memory every `checkpoint.replicate_every` steps."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from megapar.checkpoint import keep_newest
from megapar.config.schema import TrainConfig
from megapar.train.hooks.hook import Hook
from megapar.train.states import COPIES, Saver
from megapar.train.trainer import Step

if TYPE_CHECKING:
    from megapar.train.loop import Loop


class Replicate(Hook):
    """Written as a checkpoint is, hashes and all, so it is read as one, in any layout. One is kept, the newest."""

    order = 31

    def __init__(self, loop: "Loop") -> None:
        super().__init__(loop)
        self.saver = Saver(Path(os.environ[COPIES]), None)

    @classmethod
    def wanted(cls, config: TrainConfig) -> bool:
        return config.checkpoint.replicate and COPIES in os.environ

    def after(self, step: int, done: Step) -> None:
        config = self.loop.config
        if step % config.checkpoint.replicate_every or step == config.train.steps:
            return
        self.loop.settle()
        with self.saver.kept_going(config, self.loop.writer):
            self.saver.save(step, self.loop.trainer, config)
        if self.loop.trainer.mesh.rank == 0:
            keep_newest(self.saver.folder, 1)


HOOK = Replicate
