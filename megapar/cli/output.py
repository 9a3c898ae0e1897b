"""What commands say besides their results, and where they may write those."""

import os
import sys
from pathlib import Path
from typing import TextIO

from megapar.config.errors import ConfigError


def say(line: str) -> None:
    """A line about what is going on, beside the results on standard output."""
    _print(line, sys.stderr)


def show(text: str) -> None:
    """Results of a run, which is done also where nobody reads them any more."""
    _print(text, sys.stdout)


def _print(text: str, stream: TextIO) -> None:
    """Print, or go on without the terminal or pipe if it has gone, as a rank does."""
    try:
        print(text, file=stream, flush=True)
    except OSError:
        # What is still buffered must have somewhere to go, or every later flush fails too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def refuse_bad_out(out: str | None, run_dir: str | None, key: str = "out") -> None:
    """Raise ConfigError where a file can't be written. In the run directory it can: that is yet to be made."""
    if out is None:
        return
    path = Path(out)
    folder = path.parent
    if path.is_dir():
        raise ConfigError(key, out, "is a folder; name a file")
    if run_dir is not None and folder.resolve() == Path(run_dir).resolve() and not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(key, out, "there is no such folder; make it, or name another file")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise ConfigError(key, out, "can't be written; name another file")
