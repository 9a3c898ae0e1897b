"""A figure beside the training that can't be had costs nothing but itself."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megapar.cli import main
from megapar.config.errors import UserError
from megapar.config.schema import TrainConfig
from megapar.launch.pool import WorkerPool
from megapar.train import summary
from megapar.train.hooks.record import Record
from megapar.train.trainer import Trainer
from tests.tiny import VOCABULARY, tiny_config

TEXT = Path(__file__).parents[2] / "megapar" / "config"


def bits_per_character(rank: int, world_size: int, config: TrainConfig, characters: int) -> float | None:
    """Of a loss of 2, with tokens of so many characters each."""
    trainer = Trainer(config, rank)
    samples: Any = trainer.task
    samples.samples["valid"].char_counts = np.full(VOCABULARY, characters, dtype=np.int32)
    found = trainer.task.figures([2.0])["val_bits_per_char"]
    trainer.close()
    return found


def test_text_without_characters_has_no_bits_per_character(pool: WorkerPool, tokens: str) -> None:
    """Ends of documents alone; before, a division by zero ended the run."""
    values: dict[str, Any] = {"train.eval_every": 1, "train.eval_samples": 2, "data.split": 0.2}
    config = tiny_config(tokens, **values)
    assert pool.run(bits_per_character, 1, config, 0) == [None]
    assert pool.run(bits_per_character, 1, config, 4) == [pytest.approx(2 / 4 / np.log(2))]


@pytest.mark.more
def test_a_sample_of_a_diverged_model_is_said_and_the_summary_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = ["model.layers=1", "model.hidden=16", "train.seq_length=8", "train.global_batch_size=4", "train.steps=3"]
    values += ["optim.lr=1e30", "optim.weight_decay=0", "task.sample_tokens=2", "logger=disabled"]
    places = [f"data.path={TEXT}", f"data.cache={tmp_path}", "data.vocab_size=400", f"run.dir={tmp_path / 'run'}"]
    assert main(["train", *values, *places]) == 0, capsys.readouterr().err
    written = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert written["steps"] == 3 and written["sample"] is None
    assert "not finite: training diverged" in written["sample_problem"]


def test_an_out_that_has_gone_does_not_cost_the_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`out` was written first, and where it failed there was no summary.json."""
    monkeypatch.setattr(summary, "summary_text", lambda summary, config: "the end")
    run = SimpleNamespace(dir=str(tmp_path))
    config: Any = SimpleNamespace(out=str(tmp_path / "gone" / "out.json"), run=run)
    writer: Any = SimpleNamespace(close=lambda: None)
    with pytest.raises(UserError, match=r"out\.json: can't be written"):
        summary.leave_summary({"loss": 1.0}, config, writer)
    assert json.loads((tmp_path / "summary.json").read_text()) == {"loss": 1.0}


def test_a_description_of_the_data_that_has_changed_does_not_cost_the_summary(tmp_path: Path) -> None:
    (tmp_path / "tokens.json").write_text("no manifest")
    config = SimpleNamespace(data=SimpleNamespace(prefix=str(tmp_path / "tokens")))
    hook: Any = SimpleNamespace(loop=SimpleNamespace(config=config))
    assert Record._skipped_text(hook) == {}
