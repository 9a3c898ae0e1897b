"""A small corpus, and the command line as a subprocess with a stub in place of training."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from megapar.cli import main

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]


@dataclass(frozen=True)
class Done:
    """A finished command: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that name a small corpus, with a cache for all tests."""
    cache = tmp_path_factory.mktemp("cache")
    return [f"data.path={REPOSITORY / 'megapar' / 'config'}", f"data.cache={cache}", "data.vocab_size=400"]


def clean_environment() -> dict[str, str]:
    """Our environment without anything that a launcher of ranks may have put there."""
    drop = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "SLURM_", "TORCHELASTIC", "MEGAPAR_", "OMP_NUM_THREADS")
    return {name: value for name, value in os.environ.items() if not name.startswith(drop)}


@pytest.fixture
def start(tmp_path: Path, corpus: list[str]) -> Callable[..., "subprocess.Popen[str]"]:
    """Start `megapar train` with a stub, in tmp_path: start(stub, *overrides, env={...})."""

    def start(stub: str, *arguments: str, env: dict[str, str] | None = None) -> "subprocess.Popen[str]":
        command = [sys.executable, str(HERE / "stub_main.py"), stub, "train", *arguments, *corpus]
        environment = clean_environment() | (env or {})
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=pipe, stderr=pipe, text=True)

    return start


@pytest.fixture
def run_process(start: Callable[..., "subprocess.Popen[str]"]) -> Callable[..., Done]:
    """The same, waiting for its end."""

    def run_process(stub: str, *arguments: str) -> Done:
        process = start(stub, *arguments)
        out, err = process.communicate(timeout=90)
        return Done(process.returncode, out, err)

    return run_process


@pytest.fixture
def run(
    tmp_path: Path, corpus: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Done]:
    """The same in this process, which has torch and a fork server: much faster, but rank 0's console is not seen."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)

    def run(stub: str, command: str, *arguments: str) -> Done:
        capsys.readouterr()
        corpus_if_needed = corpus if command == "train" else []
        code = main([command, *arguments, *corpus_if_needed], entry=f"stubs:{stub}")
        shown = capsys.readouterr()
        return Done(code, shown.out, shown.err)

    return run
