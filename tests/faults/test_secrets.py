"""What the environment holds in secret is in nothing that a run writes, says, or starts."""

import subprocess
import sys
from pathlib import Path

import pytest

from megapar.launch.watch import read_board
from tests.cli.conftest import clean_environment
from tests.cli.test_cli_launch import HANG_S, children_of, wait_for
from tests.faults.runs import TINY, fault, hydra

CANARY = "canary-4f1d9c"
NAMES = ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "DATABASE_PASSWORD")


def family(pid: int) -> list[int]:
    """A process and all that it has started."""
    return [pid, *(one for child in children_of(pid) for one in family(child))]


@pytest.mark.more
def test_no_secret_is_written_or_said(tokens: str, tmp_path: Path) -> None:
    """Through an exception, a crash, a hang with stacks, and restarts, with wandb offline, as by default."""
    plan = [fault(1, 2, "fwd", "exception"), fault(0, 3, "bwd", "segv"), fault(1, 4, "opt", "hang")]
    words = [word for word in TINY if word != "logger=disabled"] + [
        f"data.path={tokens}",
        "parallel=tp2",
        "train.steps=5",
    ]
    words += [f"run.dir={tmp_path}/run", "run.max_restarts=3", "run.watchdog_s=6", f"fault.plan={hydra(plan)}"]
    secrets = {name: f"{CANARY}-{name}" for name in NAMES}
    environment = clean_environment() | secrets | {"TMPDIR": str(tmp_path)}
    run = subprocess.Popen(
        [sys.executable, "-m", "megapar.cli", "train", *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert wait_for(lambda: any(one.step for one in read_board(tmp_path / "run")), HANG_S)
    arguments = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in family(run.pid)]
    said, _ = run.communicate(timeout=HANG_S)
    assert run.returncode == 0 and said.count("run: restart ") == 3, said
    assert len(arguments) >= 4 and not any(CANARY.encode() in one for one in arguments)
    assert CANARY not in said
    files = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()]
    names = {path.name for path in files}
    assert {"config.yaml", "environment.json", "rank-0.log", "stacks-1.txt", "restarts.jsonl"} <= names
    assert (tmp_path / "run/wandb").is_dir()
    assert [str(path) for path in files if CANARY.encode() in path.read_bytes()] == []
