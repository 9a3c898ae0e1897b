"""Fine-tuning tasks: in layouts as in one process, and their losses as a few lines of torch have them."""

from itertools import pairwise as neighbours
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, logsigmoid

from megapar.config.keys import changed
from megapar.config.schema import TrainConfig
from megapar.launch.pool import WorkerPool
from megapar.train.trainer import Trainer
from tests.parallel.layouts import compare, verify_config
from tests.records import prepared
from tests.tiny import tiny_config

SOURCES = {"sft": "instructions", "dpo": "preferences", "classify": "labelled"}
ENCODER: dict[str, Any] = {"model.causal": False}
BERT: dict[str, Any] = ENCODER | {
    "model.norm": "layernorm", "model.norm_order": "post", "model.activation": "gelu_erf", "model.bias": True,
    "model.position": "learned",
}  # fmt: skip
SPLIT = {"parallel.sequence_parallel": True}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("sft", "tp2pp2", SPLIT),
    ("sft", "dp2", {"parallel.zero": 1, "data.packing": False}),
    ("sft", "pp2", {"pipeline.schedule": "zb_h1", "train.recompute": "full", "model.dropout": 0.1}),
    ("dpo", "tp2pp2", SPLIT),
    ("dpo", "pp2dp2", {"model.tied": True}),
    ("classify", "tp2pp2", ENCODER | SPLIT | {"model.pooling": "mean", "model.pooler": True}),
    ("classify", "tp2dp2", BERT),
    ("classify", "pp2", {"pipeline.schedule": "zb_h1"}),
    ("masked_lm", "tp2pp2", ENCODER | SPLIT | {"model.output": "mlm", "data.document_mask": True}),
    ("masked_lm", "tp3", BERT | {"model.heads": 6, "model.kv_heads": 6, "model.hidden": 24, "model.tied": True}),
]


@pytest.fixture(scope="session")
def of_task(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The keys of a small config by task."""
    folder = tmp_path_factory.mktemp("tasks")
    found = {task: {"task.name": task, **prepared(folder, source)} for task, source in SOURCES.items()}
    found = {task: keys | {"train.seq_length": 48} for task, keys in found.items()}
    (folder / "text").mkdir()
    for number in range(12):
        (folder / "text" / f"{number}.txt").write_text(f"the {number} red houses and {number * 7} blue trees\n" * 4)
    from megapar.config.schema import DataConfig
    from megapar.data.prepare import prepare

    data: dict[str, Any] = {"path": str(folder / "text"), "cache": str(folder / "cache"), "vocab_size": 285}
    tokens = prepare(DataConfig(**data))
    found["masked_lm"] = {
        "data.prefix": tokens.prefix,
        "data.path": tokens.prefix,
        "model.vocab_size": tokens.vocab_size,
    }
    found["masked_lm"] |= {"task.name": "masked_lm", "train.seq_length": 24}
    return found


@pytest.mark.parametrize(("task", "layout", "values"), CASES, ids=[f"{task}-{layout}" for task, layout, _ in CASES])
def test_in_a_layout(
    task: str, layout: str, values: dict[str, Any], of_task: Any, pool: WorkerPool, tmp_path: Path
) -> None:
    """fp64, to rounding; losses too, which are means over what the ranks' samples count."""
    small: dict[str, Any] = {"model.layers": 2, "model.hidden": 16, "model.heads": 4, "model.kv_heads": 4}
    config = verify_config(of_task[task]["data.prefix"], [layout], **small | of_task[task] | values)
    [verdict] = compare(pool, tmp_path, config)
    assert verdict.passed, verdict


def one(keys: dict[str, Any], **values: Any) -> tuple[Trainer, Any]:
    config = tiny_config("", **keys | {"model.kv_heads": 4, "train.global_batch_size": 4} | values)
    trainer = Trainer(config, 0)
    [stage] = trainer.stages.values()
    stage.train(False)
    return trainer, stage


def batch_of(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"ids": tokens.view(1, -1), "samples": torch.tensor([0]), "step": torch.tensor(0)}


def log_likelihood(stage: Any, tokens: torch.Tensor, learned: torch.Tensor) -> torch.Tensor:
    """Of the learned tokens of a sequence that is alone in its sample."""
    logits = stage({}, batch_of(tokens[:-1]))["logits"]
    return -cross_entropy(logits, tokens[1:], reduction="none")[learned[1:]].sum()


def test_an_instruction_is_as_if_alone(of_task: Any) -> None:
    """The loss of packed rows is the mean over the responses of every instruction by itself; fp64."""
    trainer, stage = one(of_task["sft"])
    samples = trainer.task.samples["train"]  # type: ignore[attr-defined]
    rows = samples.batch(range(4))
    assert max(map(len, rows)) > 1
    with torch.no_grad():
        sequences = [tuple(map(torch.from_numpy, sequence)) for row in rows for sequence in row]
        alone = -sum(log_likelihood(stage, *sequence) for sequence in sequences)
        count = sum(int(learned[1:].sum()) for _, learned in sequences)
        together = sum(trainer.task.loss(stage({}, batch), batch) for batch in trainer.task.batches(1))
    assert samples.count(range(4)) == count
    assert together == pytest.approx(float(alone) / count, rel=1e-13)
    trainer.close()


def test_dpo_is_its_formula(of_task: Any) -> None:
    """log 2 where model and reference are the same; else equation 7 of Rafailov et al. 2023, of single sequences."""
    trainer, stage = one(of_task["dpo"], **{"task.beta": 0.3, "train.eval_every": 1})
    task: Any = trainer.task
    assert trainer.step(1).loss == pytest.approx(0.6931471805599453, rel=1e-13)
    stage.train(False)
    [reference] = task.reference.part.stages.values()
    batches = task.batches(2)
    with torch.no_grad():
        losses = []
        for pair in task.samples["train"].batch(range(4, 8)):
            chosen, rejected = (tuple(map(torch.from_numpy, one)) for one in pair)
            model = log_likelihood(stage, *chosen) - log_likelihood(stage, *rejected)
            frozen = log_likelihood(reference, *chosen) - log_likelihood(reference, *rejected)
            losses.append(-logsigmoid(0.3 * (model - frozen)))
        expected = torch.stack(losses).mean()
        found = sum(task.loss(stage({}, batch), batch) for batch in batches)
    assert abs(float(expected) - 0.6931471805599453) > 1e-4
    assert float(found) == pytest.approx(float(expected), rel=1e-12)
    measured = trainer.evaluate()
    assert 0.0 <= measured[1] <= 1.0 and len(measured) == 3
    trainer.close()


@pytest.mark.parametrize("pooling", ["first", "last", "mean"])
def test_padding_changes_no_scores(pooling: str, of_task: Any) -> None:
    trainer, stage = one(of_task["classify"], **ENCODER, **{"model.pooling": pooling})
    with torch.no_grad():
        for batch in trainer.task.batches(1):
            scores = stage({}, batch)["scores"]
            for row, length, expected in zip(batch["ids"], batch["lengths"], scores, strict=True):
                alone = stage({}, batch_of(row[:length]))["scores"][0]
                assert length < 48 and (alone - expected).abs().max() < 1e-13
    trainer.close()


@pytest.mark.parametrize("task", SOURCES)
def test_an_evaluation_counts_every_sample_once(task: str, of_task: Any, pool: WorkerPool) -> None:
    """Loss and measures over held-out samples whose number divides by no rank's batch."""
    keys: dict[str, Any] = of_task[task] | {"train.eval_every": 1, "train.eval_samples": 3, "model.kv_heads": 4}
    config = tiny_config("", **keys)
    found = {
        layout: pool.run(evaluated, world, changed(config, values))
        for layout, world, values in (
            ("single", 1, {"train.micro_batch_size": 1}),
            ("tp2dp2", 4, {"parallel.tp": 2, "parallel.dp": 2}),
            ("pp2", 2, {"parallel.pp": 2}),
        )
    }
    [(measured, by_hand)] = found["single"]
    if task == "classify":
        assert measured[1] == pytest.approx(by_hand, rel=1e-13)
    for layout, ranks in found.items():
        sums = [sum(figures) for figures in zip(*(rank[0] for rank in ranks), strict=True)]
        assert sums == pytest.approx(measured, rel=1e-12), layout


def evaluated(rank: int, world_size: int, config: TrainConfig) -> tuple[list[float], float | None]:
    """A rank's part of what is measured; alone also a classifier's accuracy text by text."""
    trainer = Trainer(config, rank)
    found, by_hand = trainer.evaluate(), None
    if world_size == 1 and config.task.name == "classify":
        [stage] = trainer.stages.values()
        samples = trainer.task.samples["valid"]  # type: ignore[attr-defined]
        texts = samples.batch(trainer.task.held_out_numbers())  # type: ignore[attr-defined]
        right = 0
        for ids, length, label in zip(texts["ids"], texts["lengths"], texts["classes"], strict=True):
            with torch.no_grad():
                scores = stage({}, batch_of(torch.from_numpy(ids[:length])))["scores"]
            right += int(scores.argmax()) == label
        by_hand = right / 3
    trainer.close()
    return found, by_hand


def test_what_is_hidden(of_task: Any, pool: WorkerPool) -> None:
    """15% of the tokens, others each epoch; of these 80% masked, 10% random, the rest as they are."""
    config = tiny_config("", **of_task["masked_lm"] | ENCODER | {"train.seq_length": 40, "model.output": "mlm"})
    trainer = Trainer(config, 0)
    task: Any = trainer.task
    seen: dict[str, int] = dict.fromkeys(("mask", "other", "same"), 0)
    first: dict[int, torch.Tensor] = {}
    for step in range(1, 60):
        for batch in task.batches(step):
            ids, labels = batch["ids"], batch["labels"]
            windows = torch.from_numpy(task.samples["train"].batch(batch["samples"].tolist())[:, :-1])
            hidden = labels != -1
            assert (hidden.sum(1) == 6).all() and float(batch["count"]) == 8 * 6
            assert torch.equal(ids[~hidden], windows[~hidden]) and torch.equal(labels[hidden], windows[hidden])
            seen["mask"] += int((ids[hidden] == task.mask).sum())
            seen["same"] += int((ids[hidden] == labels[hidden]).sum())
            seen["other"] += int(((ids[hidden] != labels[hidden]) & (ids[hidden] != task.mask)).sum())
            first.update(zip(batch["samples"].tolist(), hidden, strict=True))
    total, epoch = sum(seen.values()), task.samples["train"].num_samples
    assert seen["mask"] / total == pytest.approx(0.8, abs=0.03) and seen["same"] / total == pytest.approx(0.1, abs=0.03)
    order = task.samples["train"].order
    again = [n for n in range(epoch, 2 * epoch) if n in first]
    earlier = {order.item(n): n for n in range(epoch)}
    assert any(not torch.equal(first[n], first[earlier[order.item(n)]]) for n in again)
    trainer.close()


def test_sequences_of_a_row(of_task: Any) -> None:
    """Where sequences begin is where positions are 0, and nothing is predicted across."""
    trainer, _ = one(of_task["sft"])
    for batch in trainer.task.batches(1):
        starts = batch["starts"].tolist()
        positions, labels = batch["positions"].reshape(-1), batch["labels"].reshape(-1)
        for start, stop in neighbours(starts):
            assert positions[start:stop].tolist() == list(range(stop - start))
            counted = (labels[start:stop] != -1).nonzero().reshape(-1).tolist()
            if counted:  # the response, to its end
                assert counted == list(range(counted[0], stop - start)) and labels[stop - 1] == 1
    trainer.close()
