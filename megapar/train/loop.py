"""One rank of `megapar train`: the loop from the first step to the summary."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megapar.checkpoint import keep_newest, load, load_weights, save
from megapar.config.schema import TrainConfig
from megapar.console import console
from megapar.files import write_atomic
from megapar.generate.text import keep_tokenizer
from megapar.stop import stop_request
from megapar.train.hooks import hook_kinds
from megapar.train.metrics import MetricsWriter, finite
from megapar.train.summary import summary_text
from megapar.train.trainer import Trainer


def run(config: TrainConfig, rank: int, world_size: int) -> None:
    """Train as rank `rank` of `world_size` with the default process group up. `config` is resolved."""
    if config.train.device == "cuda":  # on a CPU our operations are deterministic, and asking costs seconds of imports
        torch.use_deterministic_algorithms(True)
        # That would also fill every fresh tensor with NaN; we never read one before writing it.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    Loop(config, rank).run()


class Loop:
    """The steps of a run. Every rank walks it alike; rank 0 also writes. What happens around a step is in hooks."""

    def __init__(self, config: TrainConfig, rank: int) -> None:
        assert config.run.dir is not None
        self.config, self.folder = config, Path(config.run.dir)
        self.trainer = Trainer(config, rank)
        self.first_step, self.skipped_before = 1, 0
        self.stopping = False  # asked by Ctrl-C; on all ranks alike
        if config.checkpoint.load is not None:
            resumed = load(config.checkpoint.load, self.trainer.optimizer, config)
            self.first_step, self.skipped_before = resumed.step + 1, resumed.skipped
        elif config.checkpoint.weights is not None:
            load_weights(config.checkpoint.weights, self.trainer.optimizer, config)
        own = (self.folder / "checkpoints").resolve()
        self.goes_on = Path(config.checkpoint.load or "/").resolve().is_relative_to(own)  # in its own directory
        self.writer = MetricsWriter(config, console(), self.first_step) if rank == 0 else None
        if self.writer is not None:
            keep_tokenizer(config)
        self._saved: tuple[int, Path] | None = None
        self.hooks = [kind(self) for kind in hook_kinds() if kind.wanted(config)]

    def run(self) -> None:
        for hook in self.hooks:
            hook.start()
        if self.writer is not None:
            stop_request().listen(True)
        for step in range(self.first_step, self.config.train.steps + 1):
            for hook in reversed(self.hooks):
                hook.before(step)
            done = self.trainer.step(step, partial(self._reduced, step))
            for hook in self.hooks:
                hook.after(step, done)
            if self.stopping and step < self.config.train.steps:
                self._interrupt(step)
                return
        if self.writer is not None:
            stop_request().listen(False)
        self.settle()
        summary: dict[str, Any] = {}
        for hook in self.hooks:
            summary |= hook.finish()
        if self.writer is not None:
            self._summarise(self.writer, summary)
        self.trainer.close()

    def settle(self) -> None:
        """Have every hook look at the figures that it has not looked at: before a row or a state of this step is
        written that waits for the device anyway. Collective."""
        for hook in self.hooks:
            hook.settle()

    def save(self, step: int) -> Path:
        """The checkpoint of the state after this step, written now unless it is there already. Collective."""
        if self._saved is None or self._saved[0] != step:
            folder = self.folder / "checkpoints"
            if self.writer is not None:
                self.writer.sync()
            self._saved = step, save(folder, self.trainer.optimizer, self.config, step)
            if self.writer is not None and self.config.checkpoint.keep:
                for problem in keep_newest(folder, self.config.checkpoint.keep):
                    self.writer.say(problem)
        return self._saved[1]

    def _interrupt(self, step: int) -> None:
        self.settle()
        saved = self.save(step)
        if self.writer is not None:
            self.writer.say(f"step {step:>6}  interrupted; {saved} has its state")
            self.writer.close()
            stop_request().answer()
        self.trainer.close()

    def _reduced(self, step: int) -> None:
        for hook in self.hooks:
            hook.on_reduced(step)

    def _summarise(self, writer: MetricsWriter, summary: dict[str, Any]) -> None:
        text = json.dumps(finite(summary), indent=1, allow_nan=False) + "\n"
        try:
            write_atomic(self.folder / "summary.json", text)
            if self.config.out is not None:  # its folder may have gone
                write_atomic(Path(self.config.out), text)
        finally:  # also if there is no room for it
            writer.close()
            print(summary_text(summary, self.config), file=console(), flush=True)
