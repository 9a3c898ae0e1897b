"""Ranks started on this machine: output, root cause, exit codes, and that no process stays behind."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from torch.distributed.launcher import api

from megapar.cli import main
from megapar.config import TrainConfig
from megapar.config.file import load
from megapar.launch.rank import Job, _fail, read_reports
from megapar.torch_compat import launch_config

FOLDER = "run.dir=run"
HANG_S = 100  # stubs sleep for 120 s, and collectives wait for 300 s


def seen(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("seen-*.json"))]


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def pids_when_running(folder: Path, ranks: int) -> list[int]:
    def written() -> bool:
        return all((folder / f"pid-{rank}").exists() and (folder / f"pid-{rank}").read_text() for rank in range(ranks))

    assert wait_for(written, 60), "the ranks did not start"
    return [int((folder / f"pid-{rank}").read_text()) for rank in range(ranks)]


def test_eight_ranks_meet_and_only_the_launcher_knows_hydra(run_process: Callable, tmp_path: Path) -> None:
    done = run_process("ok", "parallel=tp2pp2dp2", FOLDER)
    assert done.code == 0, done.err
    assert done.out == "shown 8\n"  # rank 0's console; what ranks print is in the logs
    ranks = seen(tmp_path / "run")
    assert [rank["sum"] for rank in ranks] == [28.0] * 8
    assert not any(rank["hydra"] for rank in ranks)
    assert {rank["threads"] for rank in ranks} == {max(1, len(os.sched_getaffinity(0)) // 8)}
    assert all(rank["spared"] > 20 * rank["objects"] for rank in ranks), "a collection would look at all of torch"
    assert "noise of rank 5" in (tmp_path / "run/logs/rank-5.log").read_text()


def test_ranks_are_handed_a_schedule_that_takes_a_search(run_process: Callable) -> None:
    done = run_process("searches", "parallel=pp2", "pipeline.schedule=auto", FOLDER)
    assert (done.code, done.out) == (0, "2\n"), done.err


def test_run_directory(run: Callable, tmp_path: Path) -> None:
    assert run("ok", "train", "run.name=first", "train.steps=3").code == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.endswith("-first")
    config = load(TrainConfig, folder / "config.yaml")
    assert (config.train.steps, config.parallel.dp, config.model.vocab_size) == (3, 1, 400)
    assert Path(f"{config.data.prefix}.bin").exists()
    overrides = yaml.safe_load((folder / "overrides.yaml").read_text())
    assert {"train.steps=3", "run.name=first"} <= set(overrides)
    facts = json.loads((folder / "environment.json").read_text())
    assert facts["packages"]["torch"] and facts["python"] and facts["kernels"]["attention"] == "torch"
    assert os.uname().nodename not in facts.values()
    assert (folder / "logs").is_dir() and (folder / "checkpoints").is_dir()


def test_run_directory_of_another_config_is_refused(run: Callable) -> None:
    assert run("ok", "train", FOLDER, "train.steps=3").code == 0
    again = run("ok", "train", FOLDER, "train.steps=3")
    assert again.code == 0
    other = run("ok", "train", FOLDER, "train.steps=3", "train.seed=4")
    assert other.code == 2
    line = other.err.strip().splitlines()[-1]
    assert "run.dir=run" in line and "train.seed 1234 -> 4" in line and "choose another" in line


@pytest.mark.parametrize("stub", ["raises", "late", "killed", "mistake"])
def test_the_culprit_is_named_and_nobody_else(stub: str, run: Callable, tmp_path: Path) -> None:
    start = time.monotonic()
    done = run(stub, "train", "parallel=dp4", FOLDER)
    assert time.monotonic() - start < HANG_S
    said = [line for line in done.err.splitlines() if not line.startswith(("run: ", "data: "))]
    if stub in ("raises", "late"):
        assert done.code == 1
        assert said[0].startswith("Traceback") and "ValueError: the culprit's own words" in said
        assert said[-1] == "rank 1 failed: ValueError: the culprit's own words; logs: run/logs/rank-1.log"
        assert "onnection" not in done.err  # what the victims said is in their logs
        assert "the culprit's own words" in (tmp_path / "run/logs/rank-1.log").read_text()
    elif stub == "killed":
        assert done.code == 1
        assert len(said) == 1 and said[0].startswith("rank 3 failed: ended by SIGKILL")
    else:
        assert done.code == 2
        assert said == ["tokens.bin: truncated at byte 12; make it again with `megapar data`"]


@pytest.mark.parametrize("stub", ["sleeps", "busy"])
def test_nothing_survives_a_killed_launcher(stub: str, start: Callable, tmp_path: Path) -> None:
    launcher = start(stub, "parallel=dp2", FOLDER)
    ranks = pids_when_running(tmp_path / "run", 2)
    group = children_of(launcher.pid)  # the fork server and the resource tracker
    assert group
    launcher.kill()
    launcher.wait()
    assert wait_for(lambda: not any(map(alive, ranks + group)), HANG_S), "processes stayed behind"
    launcher.communicate()


SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("number", SIGNALS)
def test_interruption_is_quiet(number: signal.Signals, start: Callable, tmp_path: Path) -> None:
    interrupt_and_wait(number, start, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_interruption_is_quick(number: signal.Signals, start: Callable, tmp_path: Path) -> None:
    assert interrupt_and_wait(number, start, tmp_path) < 5


def interrupt_and_wait(number: signal.Signals, start: Callable, tmp_path: Path) -> float:
    """Seconds until no process is left of a run that has begun no step."""
    launcher = start("sleeps", "parallel=dp2", FOLDER)
    ranks = pids_when_running(tmp_path / "run", 2)
    begin = time.monotonic()
    launcher.send_signal(number)
    _, err = launcher.communicate(timeout=HANG_S)
    assert launcher.returncode == 85
    first, *said = [line for line in err.splitlines() if not line.startswith(("run: ", "data: "))]
    assert first == f"{number.name}: no step has begun, so there is no state to save"
    assert said[0] == "interrupted" and said[1].startswith("megapar train ") and len(said) == 2
    assert wait_for(lambda: not any(map(alive, ranks)), HANG_S)
    return time.monotonic() - begin


@pytest.mark.more
@pytest.mark.parametrize("delay", [0.0, 0.3])
def test_interruption_while_the_fork_server_starts(delay: float, tmp_path: Path, corpus: list[str]) -> None:
    """A terminal sends Ctrl-C to all processes: the fork server's half-done imports must not answer it."""
    command = [sys.executable, "-m", "megapar.cli", "verify", "layouts=[tp2]", "run.dir=run", *corpus]
    pipe = subprocess.PIPE
    launcher = subprocess.Popen(command, cwd=tmp_path, stderr=pipe, stdout=pipe, text=True, start_new_session=True)
    assert wait_for(lambda: len(children_of(launcher.pid)) == 2, 30)
    time.sleep(delay)
    os.killpg(launcher.pid, signal.SIGINT)
    _, err = launcher.communicate(timeout=30)
    assert launcher.returncode == 130
    assert [line for line in err.splitlines() if not line.startswith("data: ")] == ["interrupted"]


class Full(io.StringIO):
    """A text file on a full disk."""

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("reports", ["there", "full", None])
def test_a_full_disk_does_not_hide_the_cause(
    reports: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = None if reports is None else str(tmp_path / ("missing" if reports == "full" else ""))
    job = Job("", "", "", str(tmp_path), "cpu", 1.0, 1, reports=folder)
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stderr", Full())
    assert _fail(job, 0, ValueError("the cause"), terminal, None) == 1
    sys.stderr.write("and all that comes later goes nowhere")
    if reports == "there":
        (report,) = read_reports(tmp_path)
        assert (report.line, terminal.getvalue()) == ("ValueError: the cause", "")
    else:
        assert "rank 0 failed: ValueError: the cause" in terminal.getvalue()


def test_data_command_prints_a_table(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["data", *corpus, "out=tokens/mine"]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if "largest" not in line)
    assert rows["vocabulary"] == "400" and int(rows["tokens"].replace(",", "")) > 1000
    assert Path("tokens/mine.bin").exists()


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_the_launcher_of_an_older_torch(run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []
    newer = ("shutdown_timeout", "signals_to_handle")

    class Older(api.LaunchConfig):
        """torch 2.11's: without two fields, and refusing them."""

        __dataclass_fields__: ClassVar = {one.name: one for one in fields(api.LaunchConfig) if one.name not in newer}

        def __init__(self, **settings: Any) -> None:
            given.append(settings)
            super().__init__(**settings)

    ours: dict[str, Any] = {"shutdown_timeout": 5, "signals_to_handle": "SIGTERM"}
    made = launch_config(**ours, min_nodes=1, max_nodes=1, nproc_per_node=1)
    assert all(getattr(made, name, value) == value for name, value in ours.items())
    monkeypatch.setattr(api, "LaunchConfig", Older)
    assert run("ok", "train", "parallel=dp2", FOLDER).code == 0
    assert [one["sum"] for one in seen(tmp_path / "run")] == [1.0, 1.0]
    assert len(given) == 1 and "local_addr" in given[0] and not given[0].keys() & set(newer)
