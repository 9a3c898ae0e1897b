"""A copy of the state in launchers' shared memory every `checkpoint.replicate_every` steps."""

from typing import TYPE_CHECKING

from megapar.checkpoint import keep_newest
from megapar.checkpoint.hosts import Hosts, copies_folder
from megapar.config.schema import TrainConfig
from megapar.train.hooks.hook import Hook
from megapar.train.states import Saver
from megapar.train.trainer import Step

if TYPE_CHECKING:
    from megapar.train.loop import Loop


class Replicate(Hook):
    """Written as a checkpoint is, hashes and all, so it is read as one, in any layout. One is kept, the newest; of
    several hosts each has what its ranks and those of the host before it have written."""

    order = 31

    def __init__(self, loop: "Loop") -> None:
        super().__init__(loop)
        folder = copies_folder()
        assert folder is not None
        self.hosts = Hosts(folder, loop.trainer.mesh)
        self.saver = Saver(folder, None, self.hosts)

    @classmethod
    def wanted(cls, config: TrainConfig) -> bool:
        return config.checkpoint.replicate and copies_folder() is not None

    def after(self, step: int, done: Step) -> None:
        config = self.loop.config
        if step % config.checkpoint.replicate_every or step == config.train.steps:
            return
        self.loop.settle()
        with self.saver.kept_going(config, self.loop.writer):
            self.saver.save(step, self.loop.trainer, config)
            if self.hosts.leads:  # all hosts have it by now
                keep_newest(self.saver.folder, 1, spread=self.hosts.count > 1)


HOOK = Replicate
