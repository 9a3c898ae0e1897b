"""The terminal of the person who started the run, as a text file, and what is typed there. Each rank's own output goes
to its log instead."""

import io
import os
import select
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


TYPED = "typed"  # the launcher's pipe to rank 0


class Typed:
    """Lines that somebody types, or a program writes, from a descriptor."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._read, self._ended = descriptor, b"", False

    def line(self, timeout: float) -> str | None:
        """The next line, without its end; None: there is none after `timeout` seconds. Raises EOFError at the end."""
        while b"\n" not in self._read:
            if self._ended and self._read:
                break
            if self._ended:
                raise EOFError
            if not select.select([self._descriptor], [], [], timeout)[0]:
                return None
            given = os.read(self._descriptor, 1 << 16)
            self._read, self._ended = self._read + given, not given
        line, _, self._read = self._read.partition(b"\n")
        return line.removesuffix(b"\r").decode(errors="replace")


_typed: Typed | None = None


def typed() -> Typed:
    """What is typed, on global rank 0 of a job that wants it; standard input outside a rank."""
    return _typed if _typed is not None else Typed(0)


def set_typed(descriptor: int) -> None:
    """Make what comes from a descriptor what `typed()` returns in this process."""
    global _typed
    _typed = Typed(descriptor)
