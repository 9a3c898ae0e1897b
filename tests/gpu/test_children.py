"""Sections of every kind of misbehaviour: the others go on, rows say what happened, and nothing stays behind."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.conftest import Accept
from tests.gpu.statements import FOLDER, ROOT

SECTIONS = {
    "new": """
def run(run):
    run.row("found", run.section == "new")
SECTION = Section("new", 1, 5, run)
""",
    "crash": """
def run(run):
    run.row("before", True)
    import os
    os.abort()
SECTION = Section("crash", 1, 5, run)
""",
    "raises": """
def run(run):
    raise ValueError("on purpose")
SECTION = Section("raises", 1, 5, run)
""",
    "absent": """
def run(run):
    import no_such_package
SECTION = Section("absent", 1, 5, run)
""",
    "moved": """
from megapar.kernels import no_such_name
SECTION = Section("moved", 1, 5, print)
""",
    "hang": """
def run(run):
    import os, subprocess, time
    same = subprocess.Popen(["sleep", "1000"])
    own = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    (run.out / "pids.tmp").write_text(f"{os.getpid()} {same.pid} {own.pid}")
    (run.out / "pids.tmp").rename(run.out / "pids")
    time.sleep(1000)
SECTION = Section("hang", 1, 1, run)
""",
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository with these sections too."""
    root = tmp_path_factory.mktemp("checkout")
    for name in ("megapar", "kernels", "conf", "tests"):
        (root / name).symlink_to(ROOT / name)
    shutil.copytree(FOLDER, root / "experiments" / "gpu", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "experiments" / "__init__.py").touch()
    for name, text in SECTIONS.items():
        path = root / "experiments" / "gpu" / "sections" / f"{name}.py"
        path.write_text(f"from experiments.gpu.section import Section\n{text}")
    return root


def test_a_section_that_fails_stops_no_other(checkout: Path, accept: Accept, tmp_path: Path) -> None:
    outcome = accept("--only", ",".join(SECTIONS), "--out", str(tmp_path), root=checkout)
    assert outcome.code == 1
    rows = {(row["section"], row["check"]): row for row in read(tmp_path)}
    assert rows["new", "found"]["ok"] is True
    assert rows["crash", "before"]["ok"] is True and "ended with -6" in rows["crash", "section"]["note"]
    assert rows["raises", "section"]["note"] == "ValueError: on purpose"
    assert rows["absent", "section"]["ok"] is None and "no_such_package" in rows["absent", "section"]["reason"]
    assert rows["moved", "section"]["ok"] is False and "no_such_name" in rows["moved", "section"]["note"]
    assert rows["hang", "section"]["ok"] is False and "killed after" in rows["hang", "section"]["note"]
    assert "time.sleep(1000)" in (checkout / "experiments/gpu/sections/hang.py").read_text()
    assert "hang.py" in (tmp_path / "logs" / "hang.txt").read_text(), "the log says where it hung"
    assert gone((tmp_path / "pids").read_text())
    assert not (tmp_path / "work").exists()


@pytest.mark.more
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_process(checkout: Path, tmp_path: Path, number: signal.Signals) -> None:
    script, out = checkout / "experiments" / "gpu" / "accept.py", ["--out", str(tmp_path), "--device", "cpu"]
    process = subprocess.Popen([sys.executable, str(script), "--only", "hang", *out], stdout=subprocess.DEVNULL)
    while not (tmp_path / "pids").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    process.wait(60)
    head, same, own = (tmp_path / "pids").read_text().split()
    assert gone(f"{head} {same}")
    if number == signal.SIGTERM:
        assert gone(own)
    else:  # nobody is left who could look for it
        os.kill(int(own), signal.SIGKILL)


def gone(pids: str) -> bool:
    """Whether none of these processes runs any more, after a while."""
    for _ in range(400):
        if not any(running(int(pid)) for pid in pids.split()):
            return True
        time.sleep(0.05)
    return False


def running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def read(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "accept.json").read_text())


REFUSED = {
    ("--only", "nothing"): "--only nothing: no such section",
    ("--out", "/proc/nothing"): "--out /proc/nothing: ",
    ("--device", "cuda"): "--device cuda: torch finds no GPU here",
}
FIRST, *OTHERS = REFUSED


@pytest.mark.parametrize("arguments", [FIRST, *(pytest.param(one, marks=pytest.mark.more) for one in OTHERS)])
def test_a_mistake_is_one_line(arguments: tuple[str, str], accept: Accept) -> None:
    outcome = accept(*arguments)
    assert outcome.code == 2 and outcome.said.count("\n") == 1 and REFUSED[arguments] in outcome.said


def test_two_runs_do_not_write_to_one_folder(accept: Accept, tmp_path: Path) -> None:
    given = ("--only", "judge", "--seconds", "1", "--out", str(tmp_path))
    (tmp_path / "accept.json").write_text("[1]")
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        outcome = accept(*given)
        assert outcome.code == 2 and outcome.said.count("\n") == 1 and "another run writes there" in outcome.said
        assert read(tmp_path) == [1] and len(list(tmp_path.iterdir())) == 2
    assert accept(*given).code == 0
    assert read(tmp_path)[0]["check"] == "seed"


def test_sections_without_time_are_skipped(accept: Accept) -> None:
    outcome = accept("--only", "judge", "--seconds", "1")
    assert outcome.code == 0 and outcome.rows[-1]["reason"] == "no time left"
