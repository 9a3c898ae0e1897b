"""Where a run stands: clocks that jump, no rights and no home, no room in shared memory or in memory, and many runs on
one machine."""

import os
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megapar.config.file import load
from megapar.config.keys import changed
from megapar.config.schema import TrainConfig
from megapar.launch.resume import decide
from tests.cli.conftest import clean_environment
from tests.cli.test_cli_launch import HANG_S
from tests.faults.runs import Runs, fault, hydra

as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root makes a namespace of mounts")
# Imported by every Python process before all else: a day ahead, a day behind, and so on.
CLOCK = """
import itertools, time
real, days = time.time, itertools.cycle((86400.0, -86400.0))
time.time = lambda: real() + next(days)
"""


@pytest.fixture(scope="module")
def runs(tokens: str, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("dp2"), tokens, ["parallel=dp2", "train.steps=6"])


def train(
    runs: Runs, folder: Path, *overrides: str, before: Sequence[str] = (), **options: Any
) -> "subprocess.CompletedProcess[str]":
    """Run the command as a process of its own. before: the words in front of it"""
    command = [*before, sys.executable, "-m", "megapar.cli", *runs.words, f"run.dir={folder}", *overrides]
    more = {"env": clean_environment(), "timeout": HANG_S} | options
    return subprocess.run(command, capture_output=True, text=True, **more)  # type: ignore[call-overload]


KILLED = [f"fault.plan={hydra([fault(1, 4, 'bwd', 'sigkill')])}", "run.max_restarts=1"]


@pytest.mark.more
def test_a_clock_that_jumps_changes_nothing(runs: Runs, tmp_path: Path) -> None:
    """The watchdog finds a rank that is stopped, no other; and when a state was written does not say how new it is."""
    (tmp_path / "sitecustomize.py").write_text(CLOCK)
    jumps = clean_environment() | {"PYTHONPATH": str(tmp_path)}
    code = "import time; print(abs(time.time() - time.time()) > 100000)"
    assert subprocess.run([sys.executable, "-c", code], env=jumps, capture_output=True).stdout == b"True\n"
    plan = hydra([fault(1, 4, "bwd", "sigkill"), fault(0, 5, "fwd", "sigstop")])
    done = train(runs, tmp_path / "run", f"fault.plan={plan}", "run.max_restarts=2", "run.watchdog_s=4", env=jumps)
    assert done.returncode == 0 and done.stderr.count("failed: ") == 1 and done.stderr.count("stuck: ") == 1, (
        done.stderr
    )
    runs.compare(tmp_path / "run")
    os.utime(tmp_path / "run/checkpoints/step-00000002", (2e9, 2e9))
    config = changed(load(TrainConfig, tmp_path / "run/config.yaml"), {"train.steps": 7})
    assert decide(config).step == 6


@pytest.mark.more
def test_without_rights_or_a_home(runs: Runs, tmp_path: Path) -> None:
    """In a folder that can't be written, under a mask that leaves nothing to others. Root has its rights taken away."""
    cwd, run, closed = (tmp_path / name for name in ("cwd", "run", "closed"))
    for folder in (cwd, closed):
        folder.mkdir(mode=0o555)
    without = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.getuid() == 0 else []
    environment = {name: value for name, value in clean_environment().items() if name not in ("HOME", "XDG_CACHE_HOME")}
    alike: dict[str, Any] = {"before": without, "env": environment, "cwd": cwd, "umask": 0o077}
    done = train(runs, run, *KILLED, **alike)
    assert done.returncode == 0, done.stderr
    runs.compare(run)
    modes = {path: stat.S_IMODE(path.lstat().st_mode) for path in run.rglob("*") if not path.is_symlink()}
    assert modes and not any(mode & 0o077 for mode in modes.values()), modes
    refused = train(runs, closed / "run", **alike)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused.stderr
    assert f"run.dir={closed}/run: can't be written (Permission denied)" in refused.stderr


@pytest.mark.more
@as_root
def test_no_room_in_shared_memory(runs: Runs, tmp_path: Path) -> None:
    """For a copy of the state: the run ends with a line, or goes on without it; for less no run begins."""
    mounts, less = (
        ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"', "sh"]
        for size in ("64k", "8k")
    )
    if subprocess.run([*mounts, "true"], capture_output=True).returncode:
        pytest.skip("this machine does not allow it")
    done = train(runs, tmp_path / "stops", "checkpoint.replicate=true", before=mounts)
    assert done.returncode == 2, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("/dev/shm/megapar-copies-") and "can't be written (No space left on device)" in line, line
    done = train(runs, tmp_path / "not begun", before=less)
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("/dev/shm: no room for what processes share"), done.stderr
    overrides = ["checkpoint.replicate=true", "checkpoint.on_error=warn"]
    done = train(runs, tmp_path / "goes on", *overrides, before=mounts)
    assert done.returncode == 0 and "the run goes on without it" in done.stdout + done.stderr
    runs.compare(tmp_path / "goes on")


@pytest.mark.more
def test_no_memory(runs: Runs, tmp_path: Path) -> None:
    """The allocation that fails is named. 3 GB of addresses are enough for torch, and not for the state."""
    large = ["parallel=single", "model.hidden=2048", "model.layers=3", "model.heads=4"]
    done = train(runs, tmp_path / "run", *large, before=["prlimit", "--as=3000000000"])
    assert done.returncode == 1, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("rank 0 failed: RuntimeError") and "can't allocate memory: you tried to" in line, line


@pytest.mark.slow
def test_eight_runs_at_once(runs: Runs, tmp_path: Path) -> None:
    """None meets another's ranks, or its port."""
    words = [sys.executable, "-m", "megapar.cli", *runs.words]
    environment = clean_environment() | {"OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([*words, f"run.dir={tmp_path}/{number}"], env=environment, stderr=subprocess.PIPE, text=True)
        for number in range(8)
    ]
    said = [one.communicate(timeout=3 * HANG_S)[1] for one in started]
    assert [one.returncode for one in started] == 8 * [0], said
    for number in range(8):
        runs.compare(tmp_path / str(number))
