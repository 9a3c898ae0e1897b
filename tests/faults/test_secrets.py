"""What the environment holds in secret is in nothing that a run writes, says, or starts."""

import io
import subprocess
import sys
from pathlib import Path

import pytest

from megapar.launch.rank import Job, _fail, read_reports
from megapar.launch.watch import read_board
from megapar.redact import redacted
from tests.cli.conftest import clean_environment
from tests.cli.test_cli_launch import HANG_S, children_of, wait_for
from tests.faults.runs import TINY, fault, hydra

CANARY = "canary-4f1d9c"
NAMES = ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "DATABASE_PASSWORD")


def family(pid: int) -> list[int]:
    """A process and all that it has started."""
    return [pid, *(one for child in children_of(pid) for one in family(child))]


def test_a_text_without_its_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the names of variables, whatever their case; words that are no secrets stay, and so do names like them."""
    hidden = {
        "OPENAI_API_KEY": "sk-1234567",
        "db_password": "a b c d",
        "NPM_AUTH": "x/y+z==",
        "HF_TOKEN": "sk-12345678",
    }
    shown = {"TOKENIZERS_PARALLELISM": "parallel", "KEYBOARD": "querty", "SHORT_KEY": "true", "AUTHOR": "somebody"}
    for name, value in (hidden | shown).items():
        monkeypatch.setenv(name, value)
    for value in hidden.values():
        assert redacted(f"it is '{value}'.") == "it is '[hidden]'."
    for value in shown.values():
        assert redacted(value) == value
    assert redacted("at https://me:pa55word@host:80/x?a=b") == "at https://[hidden]@host:80/x?a=b"
    assert redacted("see https://host:80/a@b, me@host") == "see https://host:80/a@b, me@host"


def test_an_exception_with_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the report, which restarts.jsonl and the terminal have, nor the log."""
    monkeypatch.setenv("OPENAI_API_KEY", f"{CANARY}-x")
    log, terminal = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    job = Job("", "", "", str(tmp_path), "cpu", 1.0, 1, reports=str(tmp_path))
    assert _fail(job, 0, ValueError(f"bad key {CANARY}-x"), terminal, None) == 1
    [report] = read_reports(tmp_path)
    assert report.line == "ValueError: bad key [hidden]"
    assert CANARY not in report.traceback + log.getvalue() + terminal.getvalue() and "bad key" in log.getvalue()


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
