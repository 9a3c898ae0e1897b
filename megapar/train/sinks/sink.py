"""What a sink of rows is to a run."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from megapar.config.schema import TrainConfig


class Sink:
    """Takes rows in order, on a thread of its own: it may be slow, or fail, and training goes on.

    first_step: of this start of the run; warn: told once, in one line, when the sink fails
    leaves: names in the run directory of what it writes
    """

    name: str
    leaves: tuple[str, ...] = ()

    def __init__(self, config: TrainConfig, first_step: int, warn: Callable[[str], None]) -> None:
        self.config, self.first_step, self._warn = config, first_step, warn
        self._failed = False
        self._thread = ThreadPoolExecutor(1, self.name)
        self._thread.submit(self._guarded, self.start)

    @classmethod
    def wanted(cls, config: TrainConfig) -> bool:
        """Whether a run with this config has it."""
        raise NotImplementedError

    @classmethod
    def refuse(cls, config: TrainConfig) -> None:
        """Raise ConfigError for what can't work, before anything is started. Only where it is wanted."""

    def start(self) -> None:
        """Open it."""

    def write(self, row: Mapping[str, Any]) -> None:
        """A row of a step or of an evaluation, as in metrics.jsonl."""
        raise NotImplementedError

    def finish(self) -> None:
        """After the last row."""

    def log(self, row: Mapping[str, Any]) -> None:
        self._thread.submit(self._guarded, lambda: self.write(row))

    def close(self) -> None:
        """Wait until all rows are written or sent."""
        self._thread.submit(self._guarded, self.finish)
        self._thread.shutdown()

    def _guarded(self, call: Callable[[], object]) -> None:
        if self._failed:
            return
        try:
            call()
        except Exception as error:
            self._failed = True
            reason = (str(error).strip().splitlines() or [""])[0]
            self._warn(f"{self.name} stopped ({type(error).__name__}: {reason}); metrics.jsonl has every row")


def flat(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys and values of nested rows: `exposed_comm_s/tp`."""
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value
