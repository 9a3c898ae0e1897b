"""One rank of `megapar train`: the loop from the first step to the summary."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from megapar.config.schema import TrainConfig
from megapar.console import console
from megapar.data.records import keep_labels
from megapar.generate.text import keep_tokenizer
from megapar.train.hooks import hook_kinds
from megapar.train.metrics import MetricsWriter
from megapar.train.states import Saver, load_start
from megapar.train.summary import leave_summary
from megapar.train.trainer import Trainer


def run(config: TrainConfig, rank: int, world_size: int) -> None:
    """Train as rank `rank` of `world_size` with the default process group up. `config` is resolved."""
    if config.train.device == "cuda":  # on a CPU our operations are deterministic, and asking costs seconds of imports
        torch.use_deterministic_algorithms(True)
        # That would also fill every fresh tensor with NaN; we never read one before writing it.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    Loop(config, rank).run()


class Loop:
    """The steps of a run. Every rank walks it alike; rank 0 also writes. What happens around a step is in hooks.

    stopping: asked by Ctrl-C to stop behind this step; the same on all ranks
    """

    def __init__(self, config: TrainConfig, rank: int) -> None:
        assert config.run.dir is not None
        self.config, self.folder = config, Path(config.run.dir)
        self.trainer = Trainer(config, rank)
        self.start = load_start(config, self.trainer)
        self.writer = MetricsWriter(config, console(), self.start.step) if rank == 0 else None
        if self.writer is not None:
            keep_tokenizer(config)
            keep_labels(config)
        self.saver = Saver(self.folder, self.writer)
        self.stopping = False
        self.hooks = [kind(self) for kind in hook_kinds() if kind.wanted(config)]

    def run(self) -> None:
        for hook in self.hooks:
            hook.start()
        for step in range(self.start.step, self.config.train.steps + 1):
            for hook in reversed(self.hooks):
                hook.before(step)
            done = self.trainer.step(step, partial(self._reduced, step))
            for hook in self.hooks:
                hook.after(step, done)
            if self.stopping and step < self.config.train.steps:
                break
        else:
            self.settle()
            summary: dict[str, Any] = {}
            for hook in self.hooks:
                summary |= hook.finish()
            if self.writer is not None:
                leave_summary(summary, self.config, self.writer)
        self.saver.settle()
        self.trainer.close()

    def settle(self) -> None:
        """Have every hook look at the figures that it has not looked at: before a row or a state of this step is
        written that waits for the device anyway. Collective."""
        for hook in self.hooks:
            hook.settle()

    def save(self, step: int, *, wait: bool = True) -> Path:
        """The checkpoint of the state after this step, written now unless it is there already; see `Saver.save`.
        Collective."""
        return self.saver.save(step, self.trainer, self.config, wait=wait)

    def _reduced(self, step: int) -> None:
        for hook in self.hooks:
            hook.on_reduced(step)
