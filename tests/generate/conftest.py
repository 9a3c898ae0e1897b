"""Run directories of tiny models that were trained on real text; what they were prepared from is gone."""

import shutil
from pathlib import Path
from typing import Any, cast

import pytest

from megapar.checkpoint import save
from megapar.config.file import dump
from megapar.config.schema import DataConfig
from megapar.data.prepare import prepare
from megapar.data.tokenizer import open_tokenizer
from megapar.data.tokenizer.files import MODEL
from megapar.generate.text import keep_tokenizer
from megapar.train.trainer import Trainer
from tests.data.texts import make_text
from tests.tiny import tiny_config

POISON = "\x07"  # reading it gives logits that are not finite, in runs that have it


def make_run(folder: Path, poisoned: bool = False, **values: Any) -> Path:
    """Two steps, both in checkpoints; one where a token is poisoned, and no greedy text writes that one or ends."""
    (folder / "text.txt").write_text("".join(make_text(seed) for seed in range(8)), encoding="utf-8")
    data = DataConfig(path=str(folder / "text.txt"), vocab_size=400, split=0.0, cache=str(folder / "cache"))
    prepared = prepare(data)
    given: dict[str, Any] = {
        "model.vocab_size": 403,
        "data.split": 0.0,
        "run.dir": str(folder / "run"),
        "train.dtype": "fp32",
    }
    config = tiny_config(str(prepared.prefix), **given | values)
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text(dump(config))
    keep_tokenizer(config)
    trainer = Trainer(config, 0)
    for step in (1,) if poisoned else (1, 2):
        trainer.step(step)
        if poisoned:
            tokenizer, stage = open_tokenizer(folder / "run" / MODEL), cast(Any, trainer.stages[0])
            [token] = tokenizer.encode(POISON)
            stage.embedding.tokens.owner.tensor.data[token] = float("nan")
            stage.head.logits.owner.tensor.data[[token, tokenizer.end_of_text]] = 0.0  # never the likeliest
        save(folder / "run" / "checkpoints", trainer.optimizer, config, step)
    shutil.rmtree(folder / "cache")
    return folder / "run"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose context is 8 tokens."""
    return make_run(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="session")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose context is 96 tokens, and whose logits are far apart."""
    return make_run(tmp_path_factory.mktemp("talker"), True, **{"train.seq_length": 96, "model.init_std": 0.5})
