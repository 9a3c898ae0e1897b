"""TensorBoard's event files in run.dir/tensorboard: `logger=tensorboard`, by tensorboardX."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megapar.config.errors import ConfigError
from megapar.config.schema import TrainConfig
from megapar.train.sinks.sink import Sink, flat


class TensorBoard(Sink):
    name = "tensorboard"
    leaves = ("tensorboard",)

    @classmethod
    def wanted(cls, config: TrainConfig) -> bool:
        return config.logger.tensorboard

    @classmethod
    def refuse(cls, config: TrainConfig) -> None:
        if importlib.util.find_spec("tensorboardX") is None:
            raise ConfigError("logger.tensorboard", True, "needs tensorboardX: pip install tensorboardX, or use false")

    def start(self) -> None:
        from tensorboardX import SummaryWriter

        # purge_step: what an earlier start wrote of these steps is hidden.
        folder = Path(str(self.config.run.dir), "tensorboard")
        self._writer = SummaryWriter(str(folder), purge_step=self.first_step, write_to_disk=True)

    def write(self, row: Mapping[str, Any]) -> None:
        for key, value in flat(row):
            if key != "step" and isinstance(value, int | float):
                self._writer.add_scalar(key, value, row["step"])

    def finish(self) -> None:
        self._writer.close()


SINK = TensorBoard
