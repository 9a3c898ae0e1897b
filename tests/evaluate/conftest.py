"""Runs that several tests evaluate."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from megapar.config.file import dump
from megapar.train.loop import run as train_loop
from tests.evaluate.runs import TAUGHT, Plainly, train
from tests.records import WORDS, prepared
from tests.tiny import tiny_config


@pytest.fixture(scope="session")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that knows three answers by heart."""
    folder = tmp_path_factory.mktemp("taught")
    lines = [{"prompt": prompt, "response": response} for prompt, response in TAUGHT.items()] * 4
    keys = prepared(folder, "instructions", lines, split=0.0)
    return train(folder / "run", 60, **keys | {"task.name": "sft", "train.seq_length": 32, "optim.lr": 2e-2})


@pytest.fixture(scope="session")
def sorter(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plainly]:
    """A run of a classifier, by the training loop, and its model; of its records nothing is left."""
    folder = tmp_path_factory.mktemp("sorter")
    lines = [{"text": f"{word} {name}", "label": name} for word in WORDS for name in WORDS[:3]]
    keys = prepared(folder, "labelled", lines, split=0.0)
    keys |= {"task.name": "classify", "train.seq_length": 16, "run.dir": str(folder / "run")}
    encoder: dict[str, Any] = {
        "model.causal": False,
        "model.pooling": "mean",
        "train.steps": 8,
        "logger.wandb.mode": "disabled",
    }
    config = tiny_config("", **keys | encoder)
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text(dump(config))
    train_loop(config, 0, 1)
    model = Plainly(folder / "run")
    shutil.rmtree(folder / "cache")
    return folder / "run", model
