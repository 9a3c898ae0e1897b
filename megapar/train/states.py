"""The states of a run on disk: the one that it starts from, and those that it leaves."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megapar.checkpoint import HostCopies, Saving, keep_newest, load, load_weights
from megapar.checkpoint.hosts import Hosts, copies_folder
from megapar.config.errors import UserError
from megapar.config.schema import TrainConfig
from megapar.parallel.agreement import all_say
from megapar.train.metrics import MetricsWriter
from megapar.train.rollback import RollBack, refuse_unequal_replicas
from megapar.train.trainer import Trainer


@dataclass(frozen=True)
class Start:
    """step: the first one; skipped: of those before it; goes_on: in the directory where those were."""

    step: int
    skipped: int
    goes_on: bool


def load_start(config: TrainConfig, trainer: Trainer) -> Start:
    """Read what the run goes on from, if anything. Collective."""
    assert config.run.dir is not None
    step, skipped, origin = 1, 0, None
    own = [folder for folder in (Path(config.run.dir) / "checkpoints", copies_folder()) if folder is not None]
    if config.checkpoint.load is not None:
        resumed = load(config.checkpoint.load, trainer.optimizer, config, sync=trainer.sync)
        step, skipped, origin = resumed.step + 1, resumed.skipped, resumed.folder
    elif config.checkpoint.weights is not None:
        load_weights(config.checkpoint.weights, trainer.optimizer, config)
    goes_on = origin is not None and any(origin.resolve().is_relative_to(folder.resolve()) for folder in own)
    return Start(step, skipped, goes_on)


class Saver:
    """Writes checkpoints into the run's directory, each state once. writer: rank 0's; hosts: those whose folders of
    copies they are written into instead. Every method is collective.

    Where a save is not waited for, a thread writes this rank's file from a copy of the state; the ranks meet, and the
    checkpoint gets its name, after a later step. One is under way at a time.
    """

    def __init__(self, folder: Path, writer: MetricsWriter | None, hosts: Hosts | None = None) -> None:
        self.folder, self.writer, self.hosts = folder / "checkpoints", writer, hosts
        self._last: tuple[int, Path] | None = None
        self._host = HostCopies()
        self._under_way: tuple[Saving, threading.Thread, int] | None = None

    def save(self, step: int, trainer: Trainer, config: TrainConfig, *, wait: bool = True) -> Path:
        """The checkpoint of the state after this step, written now unless it is there already.

        wait: until it is there; else the state may change, and `look` and `settle` say when it is. A save that is under
        way ends first. Raises the same UserError on all ranks where one of the two can't be written.
        """
        if self._last is None or self._last[0] != step:
            with self.kept_going(config, self.writer):  # of the one before
                self.settle()
            run = config.run
            if run.replicas_every and step % run.replicas_every and trainer.mesh["world"].size > 1:
                refuse_unequal_replicas(trainer, step)
            saving = Saving(
                self.folder,
                trainer.optimizer,
                config,
                step,
                sync=trainer.sync,
                tokens=step * trainer.task.tokens_per_step,
                host=None if wait else self._host,
                hosts=self.hosts,
            )
            self._last = step, saving.final
            if wait:
                saving.write()
                self._finish(saving, config.checkpoint.keep)
            else:
                thread = threading.Thread(target=saving.write, name="checkpoint", daemon=True)
                thread.start()
                self._under_way = saving, thread, config.checkpoint.keep
        if wait:
            self.settle()
        return self._last[1]

    @contextmanager
    def kept_going(self, config: TrainConfig, writer: MetricsWriter | None) -> Iterator[None]:
        """Where `checkpoint.on_error` is warn, what can't be written in here is said, and no error. writer: rank 0's"""
        try:
            yield
        except RollBack:
            raise
        except UserError as error:
            if config.checkpoint.on_error == "stop":
                raise
            self._last = None  # should this state be asked for once more
            if writer is not None:
                writer.say(f"checkpoint: {error}; the run goes on without it")

    def look(self) -> None:
        """End the save that is under way if every rank's file is written, or could not be. Raises as `save` does."""
        if self._under_way is not None and all_say(not self._under_way[1].is_alive(), self._under_way[0].mesh):
            self.settle()

    def settle(self) -> None:
        """Wait for the save that is under way, if any. Raises as `save` does."""
        if self._under_way is not None:
            (saving, thread, keep), self._under_way = self._under_way, None
            thread.join()
            self._finish(saving, keep)

    def _finish(self, saving: Saving, keep: int) -> None:
        """The rows of metrics are on disk before a checkpoint that a run goes on from without them."""
        if self.writer is not None:
            self.writer.sync()
        saving.finish()
        if self.writer is not None and keep:
            saving.mesh.timeline.passing("save", "removal")
            for problem in keep_newest(self.folder, keep):
                self.writer.say(problem)
