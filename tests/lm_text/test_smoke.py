"""The README's smoke form: from the command line to the README's table."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from experiments import runs
from experiments.lm_text import results
from megapar.config.errors import UserError
from megapar.config.keys import changed


@pytest.fixture(scope="module")
def smoke(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the README's command, made in a folder that is not the checkout."""
    [command] = re.findall(
        r"^megapar train (experiment=lm_text .*run\.dir=runs/smoke)$", results.README.read_text(), re.M
    )
    here = tmp_path_factory.mktemp("here")
    words = [sys.executable, "-m", "megapar.cli", "train", *shlex.split(command), f"data.cache={cache}"]
    environment = os.environ | {"PYTHONPATH": str(results.ROOT)}
    done = subprocess.run(words, cwd=here, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "the model writes:" in done.stdout
    return here / "runs" / "smoke"


def test_the_loss_falls(smoke: Path) -> None:
    rows = [json.loads(line) for line in (smoke / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    first, *_, last = [row["val_bits_per_char"] for row in rows if "val_bits_per_char" in row]
    assert losses[-1] < losses[0] - 1.5
    assert 2 < last < first - 1 < 5


def test_the_held_out_text_is_the_end_of_a_play(smoke: Path) -> None:
    """All of it but its first token and what is behind the last window, less than one."""
    run = runs.Run.read(smoke)
    texts = results.Texts.of(run)
    tokens = results.samples_of(run, "valid").num_tokens
    everything = results.samples_of(run, "valid", seq_length=tokens - 1).batch([0])[0]
    play = results.open_tokenizer(f"{run.config.data.prefix}.model").decode(everything)
    assert play.startswith(texts.context + texts.held_out) and 0 < len(texts.context) < 20
    assert len(play) - len(texts.held_out) < 10 * run.config.train.seq_length
    assert texts.counts == (1, 8) and not set(play.splitlines()[:3]) - {
        "MUCH ADO ABOUT NOTHING",
        "",
        "by William Shakespeare",
    }
    assert "MUCH ADO ABOUT NOTHING" not in texts.train and "THE MERRY WIVES OF WINDSOR" in texts.train


def test_the_table(smoke: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "ORDERS", 3)
    copy = tmp_path / "README.md"
    before, _, rest = results.README.read_text().partition(runs.BEGIN)
    after = rest.partition(runs.END)[2]
    copy.write_text(results.README.read_text())
    assert results.main([str(smoke), "--readme", str(copy)]) == 0
    new = copy.read_text()
    assert new.startswith(before) and new.endswith(after)
    run = runs.Run.read(smoke)
    rows = [line.split(" | ") for line in new[len(before) :].splitlines() if re.match(r"\| \d", line)]
    bits = [float(row[0][2:]) for row in rows]
    assert len(rows) == 1 + 3 + 5 and bits == sorted(bits)
    [mine] = [row for row in rows if "this model" in row[1]]
    summary, facts = (json.loads((smoke / f"{name}.json").read_text()) for name in ("summary", "environment"))
    assert float(mine[0][2:]) == pytest.approx(summary["evaluations"][-1]["val_bits_per_char"], abs=5e-4)
    assert mine[2:4] == ["dp2", "1234"] and mine[4:6] == [str(summary["steps"]), "0.15 M"]
    assert mine[7].startswith(facts["git"]["revision"][:10])
    assert run.command in new and facts["cpu"]["model"] in new


def test_layouts_are_compared_where_nothing_else_differs(smoke: Path) -> None:
    run = runs.Run.read(smoke)
    rows = [row | ({"loss": row["loss"] + 0.25} if row["step"] == 3 and "loss" in row else {}) for row in run.rows]
    config = changed(run.config, {"parallel.dp": 1, "run.dir": "other", "train.micro_batch_size": 2})
    other = replace(run, config=config, rows=rows)
    [line, _] = runs.agreements([run, other], results.BITS, "bits")
    assert line.startswith("Seed 1234, dp2 beside single:") and "at most 2.5e-01 nats/token" in line
    longer = replace(other, config=changed(config, {"optim.lr": 0.1}))
    assert runs.agreements([run, longer], results.BITS, "") == [] == runs.agreements([run, run], results.BITS, "")


def test_what_can_not_be_compared_is_refused(smoke: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert results.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"{tmp_path}: no finished run (no summary.json); give the run.dir of one\n"
    run = runs.Run.read(smoke)
    part = replace(run, config=changed(run.config, {"train.eval_samples": 3}))
    with pytest.raises(UserError, match=r"evaluated on 3 of \d+ held-out samples"):
        results.figures([part])
    other = replace(run, config=changed(run.config, {"data.split": 0.7}))
    with pytest.raises(UserError, match="another text, or another held-out part"):
        results.figures([run, other])
    with pytest.raises(UserError, match="no lines <!-- figures: begin"):
        runs.between("nothing", "new")
