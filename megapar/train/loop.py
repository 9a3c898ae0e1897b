"""One rank of `megapar train`: the loop from the first step to the summary."""

from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megapar.config.schema import TrainConfig
from megapar.console import console
from megapar.data.records import keep_labels
from megapar.generate.text import keep_tokenizer
from megapar.trace.announcements import Announcements
from megapar.trace.board import board
from megapar.train.hooks import Hook, hook_kinds
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

    stopping: asked by Ctrl-C to stop after this step; the same on all ranks
    """

    def __init__(self, config: TrainConfig, rank: int) -> None:
        assert config.run.dir is not None
        self.config, self.folder = config, Path(config.run.dir)
        with board().doing("building the model"):
            self.trainer = Trainer(config, rank)
        with board().doing("loading the state it starts from", waiting=True):
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
            with self._doing(hook):
                hook.start()
        if self.config.run.check_collectives and board().slot == self.trainer.mesh.rank:
            self.trainer.mesh.timeline.announcements = Announcements.on(board())
        for step in range(self.start.step, self.config.train.steps + 1):
            board().at_step(step)
            timeline = self.trainer.mesh.timeline
            if step == self.start.step + self.config.run.check_collectives:
                timeline.announcements = None
            for hook in reversed(self.hooks):
                with self._doing(hook):
                    hook.before(step)
            done = self.trainer.step(step, partial(self._reduced, step))
            for hook in self.hooks:
                with self._doing(hook):
                    hook.after(step, done)
            if self.stopping and step < self.config.train.steps:
                break
        else:
            self.settle()
            summary: dict[str, Any] = {}
            for hook in self.hooks:
                with self._doing(hook):
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
            with self._doing(hook):
                hook.on_reduced(step)

    def _doing(self, hook: Hook) -> AbstractContextManager[None]:
        """Name a hook on the board for as long as it works."""
        return self.trainer.mesh.timeline.doing("hook", type(hook).__name__.lower())
