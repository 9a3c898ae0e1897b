"""`data.document_mask`: documents that share a sample don't see each other, in every layout."""

from itertools import pairwise as neighbours
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megapar.config.errors import ConfigError
from megapar.data.indexed import IndexedTokens
from megapar.data.samples import SampleSet
from megapar.launch.pool import WorkerPool
from megapar.tasks.kinds.lm import packed
from megapar.train.trainer import Trainer
from tests.models.families import FAMILIES
from tests.pairwise import pairwise, parameters
from tests.parallel.layouts import STYLES, compare, verify_config
from tests.tiny import tiny_config, write_tokens

MASKED: dict[str, Any] = {"data.document_mask": True}
OPTIONS: dict[str, list[Any]] = {
    "style": ["llama", "gpt2", "gemma3", "olmo2"],
    "layout": ["tp2", "pp2", "dp2", "tp2pp2dp2"],
    "parallel.sequence_parallel": [False, True],
    "train.micro_batch_size": [1, 2],
    "train.recompute": ["none", "selective", "full"],
    "model.dropout": [0.0, 0.1],
}


@pytest.mark.parametrize("case", parameters(pairwise(OPTIONS), "style", "layout"))
def test_in_a_layout(case: dict[str, Any], pool: WorkerPool, prefix: str, tmp_path: Path) -> None:
    """Samples of 24 tokens of documents of 20 to 60."""
    values = (STYLES | FAMILIES)[case["style"]] | {key: value for key, value in case.items() if "." in key}
    values |= MASKED | {"train.seq_length": 24, "train.global_batch_size": 12}
    [verdict] = compare(pool, tmp_path, verify_config(prefix, [case["layout"]], **values))
    assert verdict.passed, verdict


@pytest.mark.parametrize("style", ["llama", "gpt2", "gemma3"])
def test_each_document_is_as_if_alone(style: str, tokens: str) -> None:
    """fp64, logits of every token: what the batch gives, and what its document's part gives by itself."""
    values = (STYLES | FAMILIES)[style] | MASKED | {"train.seq_length": 48, "model.vocab_size": 61}
    trainer = Trainer(tiny_config(tokens, **values), 0)
    [stage] = trainer.stages.values()
    stage.train(False)
    inside = 0
    for batch in trainer.task.batches(1):
        with torch.no_grad():
            together = stage({}, batch)["logits"]
            for start, stop in neighbours(batch["starts"].tolist()):
                if start == stop:
                    continue
                inside += start % 48 > 0
                part = {"ids": batch["ids"].view(1, -1)[:, start:stop], "samples": torch.tensor([0])}
                alone = stage({}, part | {"step": torch.tensor(0)})["logits"]
                assert (together[start:stop] - alone).abs().max() < 1e-12 * alone.abs().max()
    assert inside > 4
    trainer.close()


def test_without_it_documents_see_each_other(tokens: str) -> None:
    losses = []
    for masked in (False, True):
        values: dict[str, Any] = {"train.seq_length": 48, "data.document_mask": masked}
        trainer = Trainer(tiny_config(tokens, **values), 0)
        losses.append(trainer.step(1).loss)
        trainer.close()
    assert abs(losses[0] - losses[1]) > 1e-6


@pytest.mark.parametrize("split", ["train", "valid"])
def test_begins_are_those_of_the_documents(split: Any, tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path)
    samples = SampleSet(prefix, split=split, seq_length=13, seed=1, holdout=0.2)
    corpus = IndexedTokens(prefix)
    places = zip(corpus.document_offsets[:-1], corpus.document_offsets[1:], strict=True)
    chosen = [corpus.tokens[a:b] for (a, b), mine in zip(places, samples._mask, strict=True) if mine]
    numbers = np.concatenate([np.full(len(document), number) for number, document in enumerate(chosen)])
    for index in range(2 * samples.num_samples):
        first = samples.window(index) * 13
        own = numbers[first : first + 13]
        assert samples.begins(index).tolist() == [0, *(np.flatnonzero(np.diff(own)) + 1)]
        assert np.array_equal(samples.sample(index)[:-1], np.concatenate(chosen)[first : first + 13])


def test_packed() -> None:
    begins = [[np.array([0, 3]), np.array([0])], [np.array([0, 1, 4]), np.array([0, 2, 2])]]
    found = packed(begins, 5)
    assert found["starts"].tolist() == [[0, 3, 5, 10, 10, 10, 10, 10, 10], [0, 1, 4, 5, 7, 7, 10, 10, 10]]
    assert found["positions"].tolist() == [[[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]], [[0, 0, 1, 2, 0], [0, 1, 0, 1, 2]]]


def test_a_source_without_documents(tokens: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(SampleSet, "begins")
    trainer = Trainer(tiny_config(tokens, **MASKED), 0)
    with pytest.raises(ConfigError, match=r"^data.document_mask=true: samples of data.source=tokens have no documents"):
        trainer.task.batches(1)
    trainer.close()
