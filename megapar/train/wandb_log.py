"""Weights & Biases as a second sink: it may be slow or fail, training goes on."""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from megapar.config.schema import TrainConfig


class WandbLog:
    """Sends rows to wandb in order, on a thread of its own: starting takes it a second.

    warn: told once, in one line, when wandb fails; every row is in metrics.jsonl all the same.
    """

    def __init__(self, config: TrainConfig, warn: Callable[[str], None]) -> None:
        self._config, self._warn = config, warn
        self._run: Any = None
        self._failed = False
        self._thread = ThreadPoolExecutor(1, "wandb")
        self._thread.submit(self._guarded, self._start)

    def log(self, row: Mapping[str, Any]) -> None:
        self._thread.submit(self._guarded, lambda: self._run.log(dict(row), step=row["step"]))

    def close(self) -> None:
        """Wait until all rows are written or sent."""
        self._thread.submit(self._guarded, lambda: self._run.finish())
        self._thread.shutdown()

    def _start(self) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        self._run = wandb.init(
            project=self._config.logger.wandb.project,
            name=self._config.run.name,
            dir=self._config.run.dir,
            mode=self._config.logger.wandb.mode,
            settings=wandb.Settings(console="off", x_disable_stats=True, x_disable_meta=True),
        )

    def _guarded(self, call: Callable[[], object]) -> None:
        if self._failed:
            return
        try:
            call()
        except Exception as error:
            self._failed = True
            reason = (str(error).strip().splitlines() or [""])[0]
            self._warn(f"wandb stopped ({type(error).__name__}: {reason}); metrics.jsonl has every row")
