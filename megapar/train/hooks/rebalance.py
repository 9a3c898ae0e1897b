"""Layers move to where they are faster, by measured times, every `pipeline.rebalance` steps."""

from typing import TYPE_CHECKING

from megapar.checkpoint import load
from megapar.config.keys import changed
from megapar.config.schema import TrainConfig
from megapar.config.stages import stage_layers
from megapar.train.hooks.hook import Hook
from megapar.train.rebalance import StageTimes
from megapar.train.trainer import Step, Trainer

if TYPE_CHECKING:
    from megapar.train.loop import Loop


class Rebalance(Hook):
    """A move is a checkpoint and a new trainer, in another partition and on the same mesh."""

    order = 50

    def __init__(self, loop: "Loop") -> None:
        super().__init__(loop)
        self.times = StageTimes()
        self._done: list[Step] = []

    @classmethod
    def wanted(cls, config: TrainConfig) -> bool:
        return bool(config.pipeline.rebalance) and config.parallel.pp > 1

    def after(self, step: int, done: Step) -> None:
        loop = self.loop
        self._done.append(done)
        if step % loop.config.pipeline.rebalance or step == loop.config.train.steps:
            return
        loop.settle()
        for one in self._done:
            self.times.add(one.spans)
        self._done.clear()
        before = stage_layers(loop.config)
        after = self.times.layers(before, loop.trainer.mesh)
        if after == before:
            return
        saved, mesh = loop.save(step), loop.trainer.mesh
        loop.trainer.context.overlaps.close()
        del loop.trainer  # its memory, before the next one takes as much
        loop.config = changed(loop.config, {"pipeline.partition": after})
        loop.trainer = Trainer(loop.config, mesh.rank, mesh=mesh)
        load(saved, loop.trainer.optimizer, loop.config, sync=loop.trainer.sync)
        for hook in loop.hooks:
            hook.moved()
        if loop.writer is not None:
            loop.writer.partition(step, before, after)


HOOK = Rebalance
