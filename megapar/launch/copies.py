"""Copies of a run's state in shared memory of the launcher, ours or torchrun's: they outlive every rank, and end with
the launcher."""

import fcntl
import hashlib
import os
import secrets
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megapar.config.errors import ConfigError, UserError

SHARED = Path("/dev/shm")
PREFIX = "megapar-copies-"
HELD = ".held"  # in such a folder, locked for as long as it is somebody's
DEAF = 'trap "" INT TERM HUP QUIT USR1 USR2'
# Reads a line that the launcher writes at its end; where it was killed, the pipe is closed without one.
# Ranks that are not yet gone may write while it is removed.
REMOVE = 'for again in 1 2 3 4 5 6 7 8 9; do rm -rf -- "$@" 2> /dev/null && break; sleep 0.5; done'
GUARD = f"{DEAF}; read -r line || {{ {REMOVE}; }}"
# The same where the launcher is torchrun, which holds no pipe for us: looks whether it is still there.
TORCHRUN_GUARD = f'{DEAF}; agent=$1; shift; while kill -0 "$agent" 2> /dev/null; do sleep 0.5; done; '
TORCHRUN_GUARD += REMOVE


Held = dict[str, Any]  # see `held`


@dataclass(frozen=True)
class Copies:
    """elsewhere: by a step's folder, files that other hosts have as they were written"""

    folder: Path
    elsewhere: Mapping[str, Set[str]] = field(default_factory=dict)


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
def copies() -> Iterator[Copies]:
    """A folder in shared memory for as long as this process lives. Raises ConfigError where there is no shared
    memory."""
    sweep()
    folder = SHARED / f"{PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
    held = _make(folder)
    try:
        with removed_if_killed(folder, holds=held):
            yield Copies(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)


def copies_of_torchrun(others: Sequence[Held] = ()) -> Copies:
    """Those of the agent of torchrun that has started this rank, and that starts it again: its folder is made by the
    first, and removed when the agent has ended. Raises ConfigError where there is no such agent.

    others: what other hosts' agents have; manifests that this one lacks come into its folder
    """
    from megapar.checkpoint.format import MANIFEST, STEP_FOLDER
    from megapar.checkpoint.hosts import write_manifest

    if (folder := _of_agent()) is None:
        problem = "copies are in the memory of a launcher, ours or torchrun's; leave it out"
        raise ConfigError("checkpoint.replicate", True, problem)
    for one in others:
        if one["problem"]:
            raise ConfigError("checkpoint.replicate", True, one["problem"])
    sweep()
    if not folder.exists():
        held, nothing = _make(folder), subprocess.DEVNULL
        command = ["/bin/sh", "-c", TORCHRUN_GUARD, "sh", str(os.getppid()), str(folder)]
        subprocess.Popen(
            command, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True, pass_fds=(held,)
        )
        os.close(held)
    elsewhere: dict[str, set[str]] = {}
    for name, (text, files) in ((name, step) for one in others for name, step in one["steps"].items()):
        path = folder / "checkpoints" / name
        if not STEP_FOLDER.fullmatch(name):
            continue
        if not (path / MANIFEST).exists():
            write_manifest(path, text)
        if (path / MANIFEST).read_text(encoding="utf-8") == text:
            elsewhere.setdefault(name, set()).update(files)
    return Copies(folder, elsewhere)


def held() -> Held:
    """What the agent of torchrun on this host has, for rank 0's host.

    problem: why it can have none; steps: by folder, the manifest and the files that are here as they were written
    """
    problem: str | None = None
    steps: dict[str, tuple[str, list[str]]] = {}
    if not os.access(SHARED, os.W_OK):
        problem = f"{SHARED} of {socket.gethostname()} can't be written; leave it out"
    folder = _of_agent()
    if folder is None or not folder.exists():
        return {"problem": problem, "steps": steps}
    from megapar.checkpoint.format import MANIFEST, newest_first, read_manifest, read_plain_file
    from megapar.checkpoint.hosts import good_files

    for path in newest_first(folder / "checkpoints"):
        with suppress(UserError):
            manifest = read_manifest(path)
            text = read_plain_file(path / MANIFEST).decode()
            steps[path.name] = text, good_files(path, manifest, list(manifest.files))
    return {"problem": problem, "steps": steps}


def _of_agent() -> Path | None:
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    if run_id is None:
        return None
    return SHARED / f"{PREFIX}{os.getppid()}-{hashlib.sha256(run_id.encode()).hexdigest()[:8]}"


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
