"""Copies of a run's state in shared memory of the launcher: they outlive every rank, and end with the launcher."""

import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megapar.config.errors import ConfigError

SHARED = Path("/dev/shm")
PREFIX = "megapar-copies-"
# Reads until the launcher's end of the pipe is closed, by its end however it comes, and removes the folder.
GUARD = 'trap "" INT TERM HUP QUIT USR1 USR2; cat > /dev/null; rm -rf -- "$1"'


@contextmanager
def copies() -> Iterator[Path]:
    """A folder in shared memory for as long as this process lives. A process of its own, a shell that waits for a pipe
    to close, removes it if this one is killed. Raises ConfigError where there is no shared memory."""
    sweep()
    folder = SHARED / f"{PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
    try:
        folder.mkdir(mode=0o700)
    except OSError as error:
        problem = f"{SHARED} can't be written ({error.strerror}); leave it out"
        raise ConfigError("checkpoint.replicate", True, problem) from None
    command = ["/bin/sh", "-c", GUARD, "sh", str(folder)]
    guard = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, close_fds=True)
    assert guard.stdin is not None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        guard.stdin.close()
        guard.wait()


def sweep() -> None:
    """Remove what launchers of this user have left whose guards were killed, too."""
    for folder in SHARED.glob(f"{PREFIX}*-*"):
        pid = folder.name.removeprefix(PREFIX).partition("-")[0]
        if not Path(f"/proc/{pid}").exists():
            shutil.rmtree(folder, ignore_errors=True)
