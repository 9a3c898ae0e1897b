"""The terminal of the person who started the run, as a text file. Each rank's own output goes to its log instead."""

import io
from typing import TextIO


class _Nothing(io.TextIOBase):
    """A text file that swallows what is written, for ranks without a terminal."""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        return len(text)


_terminal: TextIO | None = None


def console() -> TextIO:
    """The terminal on global rank 0, a file that swallows everything on the others; standard output outside a rank."""
    import sys

    return _terminal if _terminal is not None else sys.stdout


def set_console(terminal: TextIO | None) -> None:
    """Make `terminal` what `console()` returns in this process; None: nothing is shown."""
    global _terminal
    _terminal = terminal if terminal is not None else _Nothing()  # type: ignore[assignment]
