"""Copies of a run's state in shared memory of the launcher, ours or torchrun's: they outlive every rank, and end with
the launcher."""

import hashlib
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
# The same where the launcher is torchrun, which holds no pipe for us: looks whether it is still there.
TORCHRUN_GUARD = f'{GUARD.partition(";")[0]}; while kill -0 "$2" 2> /dev/null; do sleep 0.5; done; rm -rf -- "$1"'


@contextmanager
def copies() -> Iterator[Path]:
    """A folder in shared memory for as long as this process lives. A process of its own, a shell that waits for a pipe
    to close, removes it if this one is killed. Raises ConfigError where there is no shared memory."""
    sweep()
    folder = SHARED / f"{PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
    _make(folder)
    command = ["/bin/sh", "-c", GUARD, "sh", str(folder)]
    guard = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, close_fds=True)
    assert guard.stdin is not None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        guard.stdin.close()
        guard.wait()


def copies_of_torchrun() -> Path:
    """The folder of the agent of torchrun that has started this rank, and that starts it again: made by the first, and
    removed when the agent has ended. Raises ConfigError where there is no such agent, or several."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    if run_id is None or int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1:
        problem = "copies are in the memory of one host's launcher, ours or torchrun's; leave it out"
        raise ConfigError("checkpoint.replicate", True, problem)
    sweep()
    agent = str(os.getppid())
    folder = SHARED / f"{PREFIX}{agent}-{hashlib.sha256(run_id.encode()).hexdigest()[:8]}"
    if not folder.exists():
        _make(folder)
        command = ["/bin/sh", "-c", TORCHRUN_GUARD, "sh", str(folder), agent]
        nothing = subprocess.DEVNULL
        subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True)
    return folder


def _make(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700)
    except OSError as error:
        problem = f"{SHARED} can't be written ({error.strerror}); leave it out"
        raise ConfigError("checkpoint.replicate", True, problem) from None


def sweep() -> None:
    """Remove what launchers of this user have left whose guards were killed, too."""
    for folder in SHARED.glob(f"{PREFIX}*-*"):
        pid = folder.name.removeprefix(PREFIX).partition("-")[0]
        if not Path(f"/proc/{pid}").exists():
            shutil.rmtree(folder, ignore_errors=True)
