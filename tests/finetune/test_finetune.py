"""The experiment's lines, and the README's smoke form: every command, from a base model to the README's table."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import runs
from experiments.finetune import data, results
from megapar.config.errors import ConfigError
from megapar.config.schema import DataConfig
from megapar.data.source import find_source


def test_the_lines(tmp_path: Path) -> None:
    """Reversed, none twice, the same every time."""
    lines = data.lines()
    assert len({line["prompt"] for line in lines}) == len(lines) == data.COUNT + data.VALID
    for line in lines[:50]:
        words = line["prompt"].removeprefix("REVERSE: ").removesuffix("\nANSWER:").split()
        assert 3 <= len(words) <= 5 and line["response"] == " " + " ".join(reversed(words))
    data.write(tmp_path)
    names = ("train", "train-chat", "valid", "valid-chat")
    counts = [len((tmp_path / f"{name}.jsonl").read_text().splitlines()) for name in names]
    assert counts == [20_000, 20_000, 500, 500]
    user, assistant = json.loads((tmp_path / "valid-chat.jsonl").read_text().splitlines()[0])["messages"]
    assert lines[0]["prompt"].startswith(user["content"]) and lines[0]["response"].endswith(assistant["content"])
    assert lines == data.lines()


def test_other_paths_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^data.path=stdlib: finetune makes its own lines; use words"):
        find_source("finetune").prepare(DataConfig(), print)


def megapar(here: Path, *words: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(results.ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megapar.cli", *words]
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.mark.more
def test_the_smoke_form(tmp_path: Path) -> None:
    text = results.README.read_text()
    commands = [shlex.split(line) for line in re.findall(r"^megapar (.*runs/smoke.*)$", text, re.M)]
    assert len(commands) == 6
    for words in commands:
        more = [f"data.cache={tmp_path / 'cache'}"] if words[0] == "train" else []
        megapar(tmp_path, *words, *more)
    lines = [json.dumps(line) for line in data.lines()[:4]]
    (tmp_path / "valid.jsonl").write_text("\n".join(lines) + "\n")
    names = ("smoke", "smoke-tp2", "smoke-lora")
    for name in names:
        told = megapar(tmp_path, "eval", f"runs/{name}", "match=valid.jsonl", f"out=runs/{name}/{runs.MATCH}")
        assert "exact match" in told
    copy = tmp_path / "README.md"
    copy.write_text(text)
    assert results.main([*(str(tmp_path / "runs" / name) for name in names), "--readme", str(copy)]) == 0
    rows = [line.split(" | ") for line in copy.read_text().splitlines() if re.match(r"\| \d", line)]
    assert [row[2] for row in rows] == ["dp2", "tp2", "dp2"] and "LoRA of rank 4" in rows[2][1]
    [agreement] = re.findall(
        r"dp2 beside tp2: losses of the first 6 steps differ by at most (\S+) nats", copy.read_text()
    )
    assert float(agreement) < 1e-5
    losses = [[row["loss"] for row in runs.Run.read(tmp_path / "runs" / name).steps] for name in names]
    assert losses[0][0] == pytest.approx(losses[2][0], rel=1e-6)  # B is 0
    assert losses[0][-1] != pytest.approx(losses[2][-1], rel=1e-6)


def test_what_is_missing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert results.main([str(tmp_path)]) == 2
    assert "no finished run (no summary.json)" in capsys.readouterr().err
