"""Copies in memory: every rank may die and no disk is read; nothing is left when the launcher ends, however it does."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from megapar.cli import main
from megapar.config.file import load
from megapar.config.keys import changed
from megapar.config.schema import TrainConfig
from megapar.launch.copies import HELD, PREFIX, SHARED, Copies, copies, sweep
from megapar.launch.resume import _verify, decide
from tests.cli.conftest import clean_environment
from tests.cli.test_cli_launch import HANG_S, alive, children_of, wait_for
from tests.faults.runs import Runs, causes, fault, hydra
from tests.faults.test_launcher import in_step

SOME = ["parallel=tp2dp2", "parallel.zero=1", "train.steps=8", "train.micro_batch_size=1"]


@pytest.fixture(scope="module")
def runs(tokens: str, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("copies"), tokens, SOME)


def left(pid: int) -> list[str]:
    """The copies of a launcher: others may have some at the same time."""
    return [path.name for path in SHARED.glob(f"{PREFIX}{pid}-*")]


def ignores(pid: int, number: signal.Signals) -> bool:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    mask = next(line.split()[1] for line in lines if line.startswith("SigIgn:"))
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.more
def test_every_rank_dies_and_the_run_goes_on_from_memory(runs: Runs) -> None:
    """With nothing on disk until the last step; and from disk where that is newer."""
    plan = [fault(3, 3, "bwd", "sigkill"), *(fault(rank, 5, "fwd", "sigkill") for rank in range(4))]
    overrides = ["checkpoint.replicate=true", "checkpoint.every=0"]
    said = runs.with_faults("memory", plan, *overrides)
    goes_on = [line for line in said if line.startswith("run: goes on from step ")]
    assert len(causes(said)) == len(goes_on) >= 2 and not left(os.getpid())
    assert goes_on[0].startswith("run: goes on from step 2 of 8, which /dev/shm/")
    assert all(line.startswith("run: goes on from step 4 of 8, which /dev/shm/") for line in goes_on[1:])
    plan = [fault(1, 6, "opt", "sigkill")]
    said = runs.with_faults("both", plan, "checkpoint.replicate=true", "checkpoint.replicate_every=2")
    assert any(f"goes on from step 5 of 8, which {runs.folder}" in line for line in said) and not left(os.getpid())


@pytest.mark.more
def test_a_point_of_a_sweep_goes_on_from_memory(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = f"fault.plan={hydra([fault(0, 3, 'bwd', 'sigkill')])}"
    overrides = ["checkpoint.replicate=true", "checkpoint.every=0", "run.max_restarts=1", "optim.lr=1e-2"]
    assert main(["train", "-m", *runs.words[1:], plan, *overrides, f"run.dir={tmp_path}/sweep"]) == 0
    assert "run: goes on from step 2 of 8, which /dev/shm/" in capsys.readouterr().err
    [row] = (tmp_path / "sweep").glob("*/summary.json")
    runs.compare(row.parent)


@pytest.mark.more
def test_nothing_is_left_of_a_killed_launcher(runs: Runs, tmp_path: Path) -> None:
    plan = f"fault.plan={hydra([fault(0, 3, 'bwd', 'hang')])}"
    command = [sys.executable, "-m", "megapar.cli", *runs.words, f"run.dir={tmp_path}/run", plan]
    run = subprocess.Popen([*command, "checkpoint.replicate=true"], env=clean_environment(), stderr=subprocess.DEVNULL)
    ranks = in_step(tmp_path / "run", 3)
    assert left(run.pid)
    group = children_of(run.pid)
    run.kill()
    run.wait()
    assert wait_for(lambda: not any(map(alive, ranks + group)), HANG_S)
    assert wait_for(lambda: not left(run.pid), HANG_S)


def test_a_shell_removes_what_a_killed_process_has_left() -> None:
    """Without any rank, and whatever signals the shell gets before."""
    code = "import time; from megapar.launch.copies import copies\nwith copies() as made:\n"
    code += "    (made.folder / 'x').write_text('x'); print(made.folder, flush=True); time.sleep(600)"
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    folder = Path(owner.stdout.readline().strip())
    assert (folder / "x").exists() and folder.stat().st_mode & 0o777 == 0o700
    [shell] = children_of(owner.pid)
    assert wait_for(lambda: ignores(shell, signal.SIGTERM), HANG_S)
    for one in (shell, *children_of(shell)):
        os.kill(one, signal.SIGTERM)
    owner.kill()
    owner.wait()
    assert wait_for(lambda: not folder.exists(), HANG_S)


def test_what_is_left_without_a_shell_goes_with_the_next_start() -> None:
    """What is held is somebody's, also where its process has a number that is nobody's here."""
    dead, other = SHARED / f"{PREFIX}{os.getpid()}-0", SHARED / f"{PREFIX}999999999-0"
    for folder in (dead, other):
        folder.mkdir()
        (folder / HELD).touch()
    with open(other / HELD) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        sweep()
        assert not dead.exists() and other.exists()
    sweep()
    assert not other.exists()
    with copies() as made:
        assert made.folder.is_dir()
    assert not made.folder.exists()


def test_a_damaged_copy_is_not_gone_on_from(runs: Runs, tmp_path: Path) -> None:
    """The one on disk is, with fewer steps."""
    folder, memory = tmp_path / "run", tmp_path / "memory"
    shutil.copytree(runs.clean, folder)
    (memory / "checkpoints").mkdir(parents=True)
    (folder / "summary.json").unlink()
    shutil.move(folder / "checkpoints/step-00000008", memory / "checkpoints")
    (folder / "checkpoints/latest").write_text("step-00000007\n")
    config = changed(load(TrainConfig, folder / "config.yaml"), {"run.dir": str(folder), "train.steps": 9})
    assert decide(config).step == 7
    with mock.patch("megapar.launch.resume._verify", wraps=_verify) as verify:
        assert decide(config, Copies(memory)).step == 8
    assert [call.args[0].parent for call in verify.mock_calls] == [memory / "checkpoints"]  # no disk is read
    newest = folder / "checkpoints/step-00000007"
    damaged = next(newest.glob("rank-*"))
    good = damaged.read_bytes()
    damaged.write_bytes(b"x")
    assert decide(config, Copies(memory)).step == 8
    damaged.write_bytes(good)
    file = next((memory / "checkpoints/step-00000008").glob("rank-*"))
    content = bytearray(file.read_bytes())
    content[-5] ^= 4
    file.write_bytes(content)
    assert decide(config, Copies(memory)).step == 7
