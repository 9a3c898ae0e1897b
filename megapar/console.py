"""The terminal of the person who started the run, as a text file. Each rank's own output goes to its log instead."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


class _Nothing(io.TextIOBase):
    """A text file that swallows what is written, for ranks without a terminal."""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        return len(text)


class _Terminal(_Nothing):
    """A terminal that may go away, as a pipe does whose reader ends: a run goes on without it."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> int:
        with self._kept_going():
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        with self._kept_going():
            self._file.flush()

    @contextmanager
    def _kept_going(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            # What is still buffered must have somewhere to go, or every later flush fails too.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._file.fileno())

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._file.encoding

    def isatty(self) -> bool:
        return self._file.isatty()

    def fileno(self) -> int:
        return self._file.fileno()


_terminal: TextIO | None = None


def console() -> TextIO:
    """The terminal on global rank 0, a file that swallows everything on the others; standard output outside a rank."""
    import sys

    return _terminal if _terminal is not None else sys.stdout


def set_console(terminal: TextIO | None) -> None:
    """Make `terminal` what `console()` returns in this process; None: nothing is shown."""
    global _terminal
    _terminal = _Terminal(terminal) if terminal is not None else _Nothing()  # type: ignore[assignment]
