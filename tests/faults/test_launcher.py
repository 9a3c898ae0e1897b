"""Signals to the launcher, its end, the time limit, and `megapar status`."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megapar.cli import main
from megapar.launch.signals import AGAIN_S
from megapar.launch.watch import read_board
from tests.cli.conftest import clean_environment
from tests.cli.test_cli_launch import HANG_S, alive, children_of, wait_for
from tests.faults.runs import Runs, fault, hydra

STEPS = 12
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def runs(tokens: str, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("dp2"), tokens, ["parallel=dp2", f"train.steps={STEPS}"])


@pytest.fixture
def start(runs: Runs, tmp_path: Path) -> Iterator[Start]:
    """Start the run in `tmp_path`/run as a process of its own, with a TMPDIR of its own."""
    started: list[subprocess.Popen[str]] = []
    (tmp_path / "tmp").mkdir()

    def start(*overrides: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "megapar.cli", *runs.words, f"run.dir={tmp_path}/run", *overrides]
        environment = clean_environment() | {"TMPDIR": str(tmp_path / "tmp")}
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def in_step(folder: Path, step: int) -> list[int]:
    """The ranks' processes, once all of them are in this step or behind it."""
    assert wait_for(lambda: bool(ranks := read_board(folder)) and all(one.step >= step for one in ranks), HANG_S)
    return [one.pid for one in read_board(folder)]


def ours(folder: Path) -> list[str]:
    """Temporary files, besides the folder that torch keeps for all its processes of a user."""
    return [path.name for path in folder.iterdir() if not path.name.startswith("torchinductor_")]


def held_in(step: int) -> str:
    """A fault that keeps rank 0 in a step long enough for a signal to come."""
    return f"fault.plan={hydra([fault(0, step, 'opt', 'delay', seconds=3.0)])}"


@pytest.mark.more
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, "time"])
def test_a_run_that_is_asked_to_stop_goes_on(number: Any, start: Start, runs: Runs, tmp_path: Path) -> None:
    """Behind the step that it is in, with exit code 85 and the command that goes on."""
    if number == "time":
        launcher = start(held_in(1), "run.time_limit_s=0.5", "checkpoint.every=0")
    else:
        launcher = start(held_in(3), "checkpoint.every=0")
        in_step(tmp_path / "run", 3)
        launcher.send_signal(number)
    _, err = launcher.communicate(timeout=HANG_S)
    said = err.strip().splitlines()
    assert launcher.returncode == 85, err
    assert said[-2] == "interrupted" and said[-1].startswith("megapar train ") and f"run.dir={tmp_path}/run" in said[-1]
    asked = "run.time_limit_s" if number == "time" else number.name
    assert any(line.startswith(f"{asked}: stopping after this step") for line in said), err
    saved = [path.name for path in (tmp_path / "run/checkpoints").glob("step-*")]
    assert saved == ["step-00000001" if number == "time" else "step-00000003"]
    assert not ours(tmp_path / "tmp")
    assert main([*runs.words, f"run.dir={tmp_path}/run"]) == 0
    runs.compare(tmp_path / "run")


@pytest.mark.more
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_to_every_process_is_one_to_the_launcher(
    number: int, start: Start, runs: Runs, tmp_path: Path
) -> None:
    """As a terminal, `timeout` and a scheduler send it: the fork server, its ranks' parent, and trackers stay."""
    launcher = start(held_in(3), "checkpoint.every=0", "checkpoint.replicate=true")
    ranks = in_step(tmp_path / "run", 3)
    for process in [*descendants(launcher.pid), launcher.pid]:
        os.kill(process, number)
    _, err = launcher.communicate(timeout=HANG_S)
    said = err.strip().splitlines()
    assert launcher.returncode == 85 and said[-2] == "interrupted", err
    assert len(said) == 4 and "stopping after this step" in said[1], err  # and nothing of Python's or torch's own
    assert wait_for(lambda: not any(map(alive, ranks)), HANG_S) and not ours(tmp_path / "tmp")
    assert main([*runs.words, f"run.dir={tmp_path}/run"]) == 0
    runs.compare(tmp_path / "run")


def descendants(pid: int) -> list[int]:
    found = children_of(pid)
    return found + [below for child in found for below in descendants(child)]


@pytest.mark.more
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_run_that_has_no_state_yet_stops_at_once(number: int, start: Start, runs: Runs, tmp_path: Path) -> None:
    """While its ranks start: with the same code and the command, which then starts."""
    launcher = start("checkpoint.every=0")
    assert wait_for(lambda: len(read_board(tmp_path / "run")) > 0, HANG_S)
    ranks = children_of(launcher.pid)
    launcher.send_signal(number)
    _, err = launcher.communicate(timeout=HANG_S)
    said = err.strip().splitlines()
    assert launcher.returncode == 85, err
    assert said[-3:-1] == [
        f"{signal.Signals(number).name}: no step has begun, so there is no state to save",
        "interrupted",
    ]
    assert said[-1].startswith("megapar train ") and f"run.dir={tmp_path}/run" in said[-1]
    assert wait_for(lambda: not any(map(alive, ranks)), HANG_S) and not ours(tmp_path / "tmp")
    assert main([*runs.words, f"run.dir={tmp_path}/run"]) == 0
    runs.compare(tmp_path / "run")


@pytest.mark.more
@pytest.mark.parametrize("way", ["again", "grace"])
def test_a_run_that_does_not_stop_is_ended(way: str, start: Start, tmp_path: Path) -> None:
    """By a second signal, or at the end of run.grace_s."""
    plan = f"fault.plan={hydra([fault(1, 2, 'opt', 'hang')])}"
    launcher = start(plan, "run.grace_s=1" if way == "grace" else "run.grace_s=1000")
    ranks = in_step(tmp_path / "run", 2)
    launcher.send_signal(signal.SIGTERM)
    if way == "again":
        assert wait_for(lambda: b"stopping" in os.read(launcher.stderr.fileno(), 4096), HANG_S)  # type: ignore[union-attr]
        time.sleep(2 * AGAIN_S)
        launcher.send_signal(signal.SIGTERM)
    launcher.communicate(timeout=HANG_S)
    assert launcher.returncode == 143
    assert wait_for(lambda: not any(map(alive, ranks)), HANG_S)


@pytest.mark.more
def test_a_rank_that_hangs_when_it_is_to_stop_is_no_reason_to_start_again(start: Start, tmp_path: Path) -> None:
    launcher = start(f"fault.plan={hydra([fault(1, 2, 'opt', 'hang')])}", "run.watchdog_s=3", "run.max_restarts=9")
    ranks = in_step(tmp_path / "run", 2)
    launcher.send_signal(signal.SIGTERM)
    _, err = launcher.communicate(timeout=HANG_S)
    assert launcher.returncode == 1 and "stuck: rank 1" in err and "run: restart" not in err, err
    assert wait_for(lambda: not any(map(alive, ranks)), HANG_S)


@pytest.mark.more
def test_nothing_is_left_of_a_killed_launcher(start: Start, runs: Runs, tmp_path: Path) -> None:
    """No process, no file in the temporary folder, no shared memory; the same command goes on to the same bits."""
    launcher = start(f"fault.plan={hydra([fault(0, 4, 'bwd', 'hang')])}")
    ranks = in_step(tmp_path / "run", 4)
    group = children_of(launcher.pid)
    launcher.kill()
    launcher.wait()
    assert wait_for(lambda: not any(map(alive, ranks + group)), HANG_S)
    assert not ours(tmp_path / "tmp")
    pids = [str(pid) for pid in [launcher.pid, *ranks, *group]]  # names of others come and go meanwhile
    assert [name for name in os.listdir("/dev/shm") if any(pid in name for pid in pids)] == []
    assert not read_board(tmp_path / "run")
    assert main([*runs.words, f"run.dir={tmp_path}/run"]) == 0
    runs.compare(tmp_path / "run")


@pytest.mark.more
def test_status(start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a live run, of one that has ended, and of none."""
    folder, file = tmp_path / "run", tmp_path / "status.json"
    launcher = start(f"fault.plan={hydra([fault(1, 2, 'opt', 'hang')])}")
    pids = in_step(folder, 2)
    assert wait_for(lambda: read_board(folder)[0].waiting, HANG_S)  # for the other rank, in the optimizer
    assert main(["status", str(folder), f"out={file}"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 3 and shown[2].split()[:3] == ["1", str(pids[1]), "2"] and shown[2].endswith("  optimizer")
    ranks = json.loads(file.read_text())["ranks"]
    assert [(one["rank"], one["pid"], one["step"]) for one in ranks] == [(0, pids[0], 2), (1, pids[1], 2)]
    assert ranks[0]["waiting"] and not ranks[1]["waiting"]
    launcher.kill()
    launcher.wait()
    assert wait_for(lambda: not any(map(alive, pids)), HANG_S)
    assert main(["status", str(folder)]) == 1
    assert "not running on this machine" in capsys.readouterr().out
    assert main(["status", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
