"""The states of a run on disk: the one that it starts from, and those that it leaves."""

from dataclasses import dataclass
from pathlib import Path

from megapar.checkpoint import keep_newest, load, load_weights, save
from megapar.config.schema import TrainConfig
from megapar.optim.optimizer import Optimizer
from megapar.train.metrics import MetricsWriter


@dataclass(frozen=True)
class Start:
    """step: the first one; skipped: of those before it; goes_on: in the directory where those were."""

    step: int
    skipped: int
    goes_on: bool


def load_start(config: TrainConfig, optimizer: Optimizer) -> Start:
    """Read what the run goes on from, if anything. Collective."""
    assert config.run.dir is not None
    step, skipped = 1, 0
    if config.checkpoint.load is not None:
        resumed = load(config.checkpoint.load, optimizer, config)
        step, skipped = resumed.step + 1, resumed.skipped
    elif config.checkpoint.weights is not None:
        load_weights(config.checkpoint.weights, optimizer, config)
    own = (Path(config.run.dir) / "checkpoints").resolve()
    return Start(step, skipped, Path(config.checkpoint.load or "/").resolve().is_relative_to(own))


class Saver:
    """Writes checkpoints into the run's directory, each state once. writer: rank 0's."""

    def __init__(self, folder: Path, writer: MetricsWriter | None) -> None:
        self.folder, self.writer = folder / "checkpoints", writer
        self._last: tuple[int, Path] | None = None

    def save(self, step: int, optimizer: Optimizer, config: TrainConfig) -> Path:
        """The checkpoint of the state after this step, written now unless it is there already. Collective."""
        if self._last is None or self._last[0] != step:
            if self.writer is not None:
                self.writer.sync()
            self._last = step, save(self.folder, optimizer, config, step)
            if self.writer is not None and config.checkpoint.keep:
                for problem in keep_newest(self.folder, config.checkpoint.keep):
                    self.writer.say(problem)
        return self._last[1]
