"""Pairs from JSONL: what a batch of them is, what is too long, what is wrong with a line."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megapar.config.errors import UserError
from megapar.config.keys import changed
from megapar.data.sources.paired import Paired
from megapar.data.tokenizer import open_tokenizer
from megapar.tasks.sampled import IGNORED
from megapar.train.trainer import Trainer
from tests.encoder_decoder.pairs import FAMILIES, prepared
from tests.tiny import tiny_config


def test_what_a_batch_is(pairs: dict[str, Any]) -> None:
    """A source ends with the end of text, and so does a target, which begins with the start instead."""
    config = tiny_config(pairs["data.prefix"], **pairs | FAMILIES["modern"])
    trainer = Trainer(config, 0)
    end = open_tokenizer(Path(pairs["data.prefix"] + ".model")).end_of_text
    batch = trainer.task.batches(1)[0]
    samples = Paired(config, "train").batch(batch["samples"].tolist())
    for row, (source, target) in enumerate(samples):
        assert source[-1] == target[-1] == end
        assert batch["source"][row, : len(source)].tolist() == source.tolist()
        assert batch["ids"][row, : len(target)].tolist() == [3, *target[:-1]]
        assert batch["labels"][row, : len(target)].tolist() == target.tolist()
        assert set(batch["labels"][row, len(target) :].tolist()) <= {IGNORED}
    trainer.close()


def test_a_pair_is_as_if_alone(pairs: dict[str, Any]) -> None:
    """fp64: a batch's loss is that of its pairs one by one, without padding. 1e-12: sums of other lengths."""
    for family in ("t5", "modern", "apart"):
        config = tiny_config(pairs["data.prefix"], **pairs | FAMILIES[family] | {"model.init_std": 0.3})
        trainer = Trainer(config, 0)
        [stage] = trainer.stages.values()
        stage.train(False)
        [batch, *_] = trainer.task.batches(1)
        with torch.no_grad():
            together = trainer.task.loss(stage({}, batch), batch) * batch["count"]
            alone = torch.zeros((), dtype=torch.float64)
            for number in batch["samples"].tolist():
                [(source, target)] = Paired(config, "train").batch([number])
                ids = torch.tensor([[config.model.encoder.start, *target[:-1]]])
                one = {"source": torch.from_numpy(source)[None], "ids": ids, "samples": torch.zeros(1).long()}
                logits = stage({}, one | {"step": torch.tensor(0)})["logits"]
                alone += torch.nn.functional.cross_entropy(logits, torch.from_numpy(target), reduction="sum")
        assert abs(float(together - alone)) < 1e-12 * float(alone)
        trainer.close()


def test_what_is_too_long(pairs: dict[str, Any]) -> None:
    long = {"train.source_length": 6, "train.seq_length": 4}
    config = tiny_config(pairs["data.prefix"], **pairs | long)
    for source, target in Paired(config, "train").batch(range(60)):
        assert len(source) <= 6 and len(target) <= 4 and {source[-1], target[-1]} == {1}
    problem = r"pairs.jsonl:\d+: (\d+) tokens, of which at most {} fit; raise {}, or use data.too_long=skip"
    for most, key, other in (
        ("6 of a source", "train.source_length", {"train.seq_length": 50}),
        ("4 of a target", "train.seq_length", {"train.source_length": 50}),
    ):
        with pytest.raises(UserError, match=problem.format(most, key)) as caught:
            Paired(changed(config, other | {"data.too_long": "refuse"}), "train")
        assert int(str(caught.value).partition(" tokens")[0].rpartition(" ")[2]) > int(most[0])
    with pytest.raises(UserError, match=r"and no other record is shorter than that; raise train.source_length"):
        Paired(changed(config, {"data.too_long": "skip", "train.seq_length": 1}), "train")
    kept = Paired(changed(config, {"data.too_long": "skip", "train.source_length": 14}), "train")
    assert 0 < kept.num_samples < 78 and np.all(kept.lengths <= [14, 4])


def test_a_line_without_a_target_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(folder: Path, count: int = 0) -> Path:
        path = folder / "pairs.jsonl"
        path.write_text('{"source": "a", "target": "b"}\n{"source": "a"}\n', encoding="utf-8")
        return path

    monkeypatch.setattr("tests.encoder_decoder.pairs.write_pairs", write)
    with pytest.raises(UserError, match=r'pairs.jsonl:2: has no "target"; it has source'):
        prepared(tmp_path)
