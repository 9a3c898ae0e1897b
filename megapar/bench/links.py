"""Loopback connections as slow as a network: the rate is set by the kernel's own pacing of a socket."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megapar.config import UserError

SOURCE = Path(__file__).with_name("pace.c")


class Links:
    """Paces connections of processes that are started inside `environment`. Linux; needs a C compiler, no root."""

    def __init__(self, folder: Path, paced: bool) -> None:
        self._rate = folder / "rate"
        self._library = folder / "pace.so" if paced else None
        if self._library is not None:
            self._build(self._library)

    def pace(self, gbit_per_s: float) -> None:
        """Of connections that are opened from now on, each; 0: as fast as they can be."""
        self._rate.write_text(str(round(gbit_per_s * 1e9 / 8)))

    @contextmanager
    def environment(self) -> Iterator[None]:
        added = {"GLOO_SOCKET_IFNAME": "lo"}
        if self._library is not None:
            added |= {"LD_PRELOAD": str(self._library), "PACE_FILE": str(self._rate)}
        kept = dict(os.environ)
        os.environ.update(added)
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(kept)

    @staticmethod
    def _build(library: Path) -> None:
        compiler = next((path for path in map(shutil.which, ("cc", "gcc", "clang")) if path), None)
        if compiler is None:
            raise UserError("bench overlap: no C compiler, which pacing needs; install gcc, or use rate=[0]")
        command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = [f"exit code {done.returncode}", *done.stderr.strip().splitlines()][-1]
            raise UserError(f"bench overlap: {compiler} failed on {SOURCE.name}: {said}")
