"""Ctrl-C asks the ranks of a run to stop behind the step, or the token, that they are in: files in a folder that they
and the launcher share. Rank 0 says that it listens while it walks the steps; all ranks look, and agree with the figures
of a step."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class StopRequest:
    """folder: where it is left; None: nobody can ask."""

    folder: Path | None = None

    def listen(self, on: bool) -> None:
        """Rank 0: whether a request is heard from now on."""
        if self.folder is not None and on:
            (self.folder / "listens").touch()
        elif self.folder is not None:
            (self.folder / "listens").unlink(missing_ok=True)

    def answer(self) -> None:
        """Rank 0: the run has stopped, and its state is saved."""
        if self.folder is not None:
            (self.folder / "stopped").touch()

    def ask(self) -> bool:
        """The launcher: ask for it. Whether anybody listens, and was not asked before."""
        if self.folder is None or not (self.folder / "listens").exists() or self.asked():
            return False
        (self.folder / "stop").touch()
        return True

    def heard(self) -> bool:
        """Rank 0: whether somebody asked, which is over with this answer: they may ask again."""
        if not self.asked():
            return False
        assert self.folder is not None
        (self.folder / "stop").unlink(missing_ok=True)
        return True

    def asked(self) -> bool:
        return self.folder is not None and (self.folder / "stop").exists()

    def answered(self) -> bool:
        return self.folder is not None and (self.folder / "stopped").exists()


_request = StopRequest()


def stop_request() -> StopRequest:
    """The one of this rank."""
    return _request


def set_stop_request(request: StopRequest) -> None:
    """Make `request` what `stop_request()` returns in this process."""
    global _request
    _request = request
