"""What a run is started under, and what it leaves: ignored signals, closed descriptors, encodings, names, modes."""

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megapar.cli import main
from megapar.launch import local
from megapar.launch.machine import out_of_memory_kills
from tests.cli.conftest import HERE, clean_environment
from tests.cli.test_cli_launch import FOLDER, HANG_S, alive, pids_when_running, seen, wait_for
from tests.cli.test_cli_rundir import SMALL


def command_of(stub: str, *arguments: str) -> list[str]:
    return [sys.executable, str(HERE / "stub_main.py"), stub, "train", *arguments]


def test_ignored_signals_stay_ignored(tmp_path: Path, corpus: list[str]) -> None:
    """nohup ignores SIGHUP, and a shell that starts a command with `&` SIGINT: in the launcher and in all ranks."""

    def as_nohup() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    launcher = subprocess.Popen(
        command_of("sleeps", "parallel=dp2", FOLDER, *corpus),
        cwd=tmp_path,
        env=clean_environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=as_nohup,
    )
    ranks = pids_when_running(tmp_path / "run", 2)
    for number in (signal.SIGHUP, signal.SIGINT):
        os.killpg(launcher.pid, number)
    time.sleep(1)
    assert launcher.poll() is None and all(map(alive, ranks))
    launcher.send_signal(signal.SIGTERM)
    launcher.communicate(timeout=HANG_S)
    assert launcher.returncode == 85
    assert wait_for(lambda: not any(map(alive, ranks)), HANG_S)


@pytest.mark.parametrize("closed", ["<&-", "<&- >&-", "<&- >&- 2>&-"])
def test_closed_descriptors_change_nothing(closed: str, tmp_path: Path, corpus: list[str]) -> None:
    command = command_of("ok", "parallel=dp2", FOLDER, *corpus)
    done = subprocess.run(
        ["bash", "-c", f'"$@" {closed}', "bash", *command],
        cwd=tmp_path,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ("" if ">" in closed[3:] else "shown 2\n")
    assert [one["sum"] for one in seen(tmp_path / "run")] == [1.0, 1.0]
    assert "noise of rank 1" in (tmp_path / "run/logs/rank-1.log").read_text()


@pytest.mark.parametrize(("before", "after", "said"), [(3, 4, "out-of-memory killer"), (3, 3, "killed none")])
def test_the_killer_of_a_rank_is_named_as_far_as_it_is_known(
    before: int, after: int, said: str, run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(out_of_memory_kills(), int | None)
    counts = iter([before, after])
    monkeypatch.setattr(local, "out_of_memory_kills", lambda: next(counts))
    done = run("killed", "train", "parallel=dp2", FOLDER)
    assert done.code == 1 and "rank 1 failed: ended by SIGKILL" in done.err and said in done.err


def test_a_terminal_in_ascii_does_not_fail_a_finished_run(tmp_path: Path, corpus: list[str]) -> None:
    environment = clean_environment() | {"PYTHONIOENCODING": "ascii"}
    command = command_of("rows", "run.dir=r_ü", *corpus)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    assert "picture     r_\\xfc/run.svg" in done.stdout
    assert (tmp_path / "r_ü/run.svg").exists()


@pytest.mark.parametrize("arguments", [["help"], ["data", "--info"], ["schedule", "--info"], ["plan", "parallel=tp2"]])
def test_every_command_writes_to_ascii(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, corpus: list[str]
) -> None:
    with open(tmp_path / "out", "w", encoding="ascii") as out:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", out)
        assert main(arguments + (corpus if arguments[0] == "plan" else [])) == 0
    assert (tmp_path / "out").stat().st_size > 100


def test_ranks_meet_without_a_name(run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On this machine the address is known: no resolver is asked, and a slow or broken one holds nothing up."""
    asked: list[Any] = []
    resolve = socket.getaddrinfo

    def getaddrinfo(host: Any, *args: Any, **options: Any) -> Any:
        if host not in ("127.0.0.1", "", None):
            asked.append(host)
        return resolve(host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    for name in ("getfqdn", "gethostbyname", "gethostbyaddr"):
        monkeypatch.setattr(socket, name, lambda *args, name=name: asked.append(name))
    assert run("ok", "train", "parallel=dp2", FOLDER).code == 0
    assert asked == []


@pytest.mark.parametrize("mask", [0o022, 0o007])
def test_files_have_the_modes_of_the_umask(mask: int, tmp_path: Path, corpus: list[str]) -> None:
    values = [
        *SMALL,
        FOLDER,
        "train.steps=2",
        "train.trace=[1,2]",
        "model.vocab_size=400",
        *corpus,
        f"data.cache={tmp_path / 'cache'}",
    ]
    command = [sys.executable, "-m", "megapar.cli", "train", *values]
    done = subprocess.run(
        command, cwd=tmp_path, env=clean_environment(), capture_output=True, text=True, timeout=90, umask=mask
    )
    assert done.returncode == 0, done.stderr
    paths = [path for path in tmp_path.rglob("*") if not path.is_symlink()]
    assert any(path.suffix == ".safetensors" for path in paths) and any(path.suffix == ".bin" for path in paths)
    wrong = {
        str(path.relative_to(tmp_path)): oct(mode)
        for path in paths
        if (mode := stat.S_IMODE(path.stat().st_mode)) != (0o777 if path.is_dir() else 0o666) & ~mask
    }
    assert wrong == {}
