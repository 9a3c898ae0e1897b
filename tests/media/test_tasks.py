"""What tasks make of samples: modalities that are left out, and micro-batches that cost about the same."""

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from megapar import verify
from megapar.config.keys import changed
from megapar.config.schema import TrainConfig
from megapar.launch.pool import WorkerPool
from megapar.part import ModelPart
from megapar.tasks import task_kind
from megapar.tasks.media import MediaTask
from megapar.tasks.sampled import evenly
from tests.media.samples import CLASSIFIES, WRITES
from tests.parallel.layouts import compare, verify_config

run_reference = verify.run_reference


def task_of(media: dict[str, Any], **keys: Any) -> MediaTask:
    config: TrainConfig = changed(verify_config(media["data.prefix"], ["tp2"], **media | WRITES | keys), {})
    part = ModelPart(changed(config, {"parallel.tp": 1, "parallel.pp": 1, "parallel.dp": 1}), 0)
    task = task_kind(config.task.name).make(part.config, part.context, {})
    assert isinstance(task, MediaTask)
    return task


def test_modalities_left_out(media: dict[str, Any]) -> None:
    """Each as often as is said, never all of a sample, and the same at every look."""
    task = task_of(media, **{"task.modality_dropout": 0.3})
    there = ["image", "audio", "text"]
    kept = [task._kept("train", number, there) for number in range(4000)]
    assert kept == [task._kept("train", number, there) for number in range(4000)]
    assert all(kept)
    for name in there:  # of all alone, 0.3^3 of the samples, the third part is put back: 0.291 +- 4 * 0.0072
        assert abs(sum(name not in some for some in kept) / 4000 - (0.3 - 0.3**3 / 3)) < 0.029
    assert task._kept("valid", 7, there) == there


def test_a_sample_without_a_modality_has_none_of_its_tokens(media: dict[str, Any]) -> None:
    task = task_of(media, **{"task.modalities": ["text"], "train.global_batch_size": 12})
    for batch in task.batches(1):
        assert not batch["kinds"].any() and batch["image"].numel() == batch["audio_samples"].numel() == 0
    images = {"task.modalities": ["image"], "data.on_error": "skip"}  # some samples have none
    task = task_of(media, **images, **{"train.global_batch_size": 12})
    assert any(batch["image"].numel() for batch in task.batches(1))
    assert not any((batch["kinds"] == 2).any() for batch in task.batches(1))


def test_runs_that_cost_about_the_same() -> None:
    """Within a dearest item of each other: the guarantee of the rule for runs without a limit."""
    random = np.random.default_rng(0)
    for runs, length in ((2, 8), (6, 4), (3, 1)):
        costs = random.pareto(2.0, runs * length)
        order = evenly(costs, runs)
        assert sorted(order.tolist()) == list(range(runs * length))
        sums = costs[order].reshape(runs, length).sum(1)
        plain = costs.reshape(runs, length).sum(1)
        assert sums.max() <= plain.max()
        if length > 1:
            assert sums.max() - sums.min() <= costs.max()


def test_balanced_batches_have_the_same_samples(media: dict[str, Any]) -> None:
    keys: dict[str, Any] = {"train.micro_batch_size": 3, "train.global_batch_size": 24}
    found = []
    for balance in (True, False):
        batches = task_of(media, **keys, **{"data.balance": balance}).batches(2)
        found.append(batches)
    numbers = [sorted(int(n) for batch in batches for n in batch["samples"]) for batches in found]
    assert numbers[0] == numbers[1]
    tokens = [[batch["image_samples"].numel() for batch in batches] for batches in found]
    assert max(tokens[0]) < max(tokens[1])


def in_order(*args: Any) -> Any:
    with mock.patch.object(MediaTask, "costs", lambda *args: None):
        return run_reference(*args)


@pytest.mark.parametrize("layout", ["dp2", "pp2"])
def test_a_balanced_step_is_the_same_step(
    layout: str, pool: WorkerPool, media: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference takes samples in their order, the layout puts them together by cost."""
    monkeypatch.setattr(verify, "run_reference", in_order)
    keys = media | CLASSIFIES | {"train.micro_batch_size": 2, "model.dropout": 0.1}
    [verdict] = compare(pool, tmp_path, verify_config(media["data.prefix"], [layout], **keys))
    assert verdict.passed, verdict
