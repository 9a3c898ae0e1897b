"""Ranks of a run are asked to stop after the step, or the token, that they are in: by the launcher, which leaves files
in a folder that they share, or, where torchrun or srun started them, by a signal to any of them. Rank 0 says that it
listens while it walks the steps; all ranks look, and agree with the figures of a step."""

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import TIMEOUT_MAX, Event, Timer

STOPPING = tuple(signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"))


@dataclass(frozen=True)
class StopRequest:
    """folder: where it is left; None: this rank alone asks. at: of the monotonic clock; it then asks."""

    folder: Path | None = None
    at: float | None = None
    here: Event = field(default_factory=Event)  # a signal to this rank has asked
    done: Event = field(default_factory=Event)  # this rank has stopped as it was asked to

    def listen(self, on: bool) -> None:
        """Rank 0: whether a request is heard from now on."""
        if self.folder is not None and on:
            (self.folder / "listens").touch()
        elif self.folder is not None:
            (self.folder / "listens").unlink(missing_ok=True)

    def finish(self) -> None:
        """Rank 0: the last step is done. What is left to do is done anyway."""
        self.listen(False)
        if self.folder is not None:
            (self.folder / "finishing").touch()

    def finishing(self) -> bool:
        return self.folder is not None and (self.folder / "finishing").exists()

    def answer(self) -> None:
        """Each rank: the run has stopped, and its state is saved."""
        self.done.set()
        if self.folder is not None:
            (self.folder / "stopped").touch()

    def ask(self) -> bool:
        """The launcher: ask for it. Whether anybody listens, or is at the end anyway, and was not asked before."""
        if self.folder is None or self._left():
            return False
        if not (self.folder / "listens").exists() and not self.finishing():
            return False
        (self.folder / "stop").touch()
        return True

    def end(self) -> None:
        """The launcher: it ends the ranks, whatever it has asked for."""
        if self.folder is not None:
            (self.folder / "over").touch()

    def over(self) -> bool:
        return self.folder is not None and (self.folder / "over").exists()

    def heard(self) -> bool:
        """Rank 0: whether somebody asked, which is over with this answer: they may ask again."""
        if not self._left():
            return False
        assert self.folder is not None
        (self.folder / "stop").unlink(missing_ok=True)
        return True

    def asked(self) -> bool:
        return self.here.is_set() or (self.at is not None and time.monotonic() >= self.at) or self._left()

    def answered(self) -> bool:
        return self.done.is_set() or (self.folder is not None and (self.folder / "stopped").exists())

    def _left(self) -> bool:
        return self.folder is not None and (self.folder / "stop").exists()


def in_time(seconds: float, then: Callable[[], None]) -> Timer:
    """A started timer that does not keep this process alive."""
    timer = Timer(min(seconds, TIMEOUT_MAX), then)
    timer.daemon = True
    timer.start()
    return timer


_request = StopRequest()


def stop_request() -> StopRequest:
    """The one of this rank."""
    return _request


def set_stop_request(request: StopRequest) -> None:
    """Make `request` what `stop_request()` returns in this process."""
    global _request
    _request = request
