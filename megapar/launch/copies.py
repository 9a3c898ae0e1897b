"""Copies of a run's state in shared memory of the launcher, ours or torchrun's: they outlive every rank, and end with
the launcher."""

import fcntl
import hashlib
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megapar.config.errors import ConfigError

SHARED = Path("/dev/shm")
PREFIX = "megapar-copies-"
HELD = ".held"  # in such a folder, locked for as long as it is somebody's
DEAF = 'trap "" INT TERM HUP QUIT USR1 USR2'
# Reads a line that the launcher writes at its end; where it was killed, the pipe is closed without one.
GUARD = f'{DEAF}; read -r line || rm -rf -- "$@"'
# The same where the launcher is torchrun, which holds no pipe for us: looks whether it is still there.
TORCHRUN_GUARD = f'{DEAF}; agent=$1; shift; while kill -0 "$agent" 2> /dev/null; do sleep 0.5; done; rm -rf -- "$@"'


@contextmanager
def removed_if_killed(*folders: str | Path, holds: int | None = None) -> Iterator[None]:
    """Have folders removed if this process is killed meanwhile: a shell does it then. holds: descriptor of a lock for
    the shell to hold, too"""
    command = ["/bin/sh", "-c", GUARD, "sh", *map(str, folders)]
    fds = () if holds is None else (holds,)
    guard = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, pass_fds=fds)
    assert guard.stdin is not None
    try:
        yield
    finally:
        with suppress(OSError):
            guard.stdin.write(b"done\n")
            guard.stdin.close()
        guard.wait()


@contextmanager
def copies() -> Iterator[Path]:
    """A folder in shared memory for as long as this process lives. Raises ConfigError where there is no shared
    memory."""
    sweep()
    folder = SHARED / f"{PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
    held = _make(folder)
    try:
        with removed_if_killed(folder, holds=held):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)


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
        held, nothing = _make(folder), subprocess.DEVNULL
        command = ["/bin/sh", "-c", TORCHRUN_GUARD, "sh", agent, str(folder)]
        subprocess.Popen(
            command, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True, pass_fds=(held,)
        )
        os.close(held)
    return folder


def _make(folder: Path) -> int:
    """Make a folder. Returns the descriptor of its lock, which is held."""
    try:
        folder.mkdir(mode=0o700)
        held = os.open(folder / HELD, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        problem = f"{SHARED} can't be written ({error.strerror}); leave it out"
        raise ConfigError("checkpoint.replicate", True, problem) from None
    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return held


def sweep() -> None:
    """Remove what launchers of this user have left whose guards were killed, too. Of one that lives the lock is held:
    its number says nothing, as containers that share this memory number their processes each for itself."""
    for folder in SHARED.glob(f"{PREFIX}*-*"):
        with suppress(OSError):
            held = os.open(folder / HELD, os.O_WRONLY)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(held)
