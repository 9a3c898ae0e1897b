"""Adapters: in layouts as in one process, beside frozen weights, and on disk alone."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megapar.checkpoint import read_manifest
from megapar.config.errors import UserError
from megapar.config.keys import changed
from megapar.config.layout import Layout
from megapar.config.schema import TrainConfig
from megapar.launch.pool import WorkerPool
from megapar.part import ModelPart
from megapar.train.trainer import Trainer
from tests.checkpoint.jobs import refused, run
from tests.models.families import FAMILIES
from tests.pairwise import pairwise, parameters
from tests.parallel.layouts import STYLES, compare, verify_config
from tests.tiny import tiny_config

LORA: dict[str, Any] = {"model.lora.rank": 3, "model.lora.alpha": 5.0}
OPTIONS: dict[str, list[Any]] = {
    "style": ["llama", "gpt2", "gemma3"],
    "layout": ["tp2", "tp3dp2", "pp2", "tp2pp2dp2", "pp4"],
    "parallel.sequence_parallel": [False, True],
    "model.kv_heads": [1, 4, 12],
    "model.lora.targets": [None, ["q", "v"], ["k", "out"], ["up", "down"]],
    "parallel.zero": [0, 1],
    "pipeline.schedule": ["1f1b", "zb_h1"],
    "train.recompute": ["none", "full"],
    "optim.name": ["adamw", "muon"],
}


def divides(case: dict[str, Any]) -> bool:
    tp = Layout.parse(case["layout"])["tp"]
    return case["model.kv_heads"] % tp == 0 or tp % case["model.kv_heads"] == 0


@pytest.mark.parametrize("case", parameters(pairwise(OPTIONS, divides), "style", "layout"))
def test_in_a_layout(case: dict[str, Any], pool: WorkerPool, prefix: str, tmp_path: Path) -> None:
    """Three steps, as in the first B is 0 and so is A's gradient."""
    values = (STYLES | FAMILIES)[case["style"]] | {key: value for key, value in case.items() if "." in key}
    [verdict] = compare(pool, tmp_path, verify_config(prefix, [case["layout"]], **values | LORA | {"train.steps": 3}))
    assert verdict.passed, verdict


def logits(part: ModelPart, ids: torch.Tensor) -> torch.Tensor:
    [stage] = part.stages.values()
    stage.train(False)
    with torch.no_grad():
        batch = {"ids": ids, "samples": torch.arange(len(ids)), "step": torch.tensor(0)}
        found: torch.Tensor = stage({}, batch)["logits"]
    return found


@pytest.mark.parametrize("targets", [None, ["q", "down"]])
def test_it_is_a_matrix_that_is_added(targets: list[str] | None, tokens: str) -> None:
    """fp64: the model with adapters, and the plain one with W + alpha / rank * B A."""
    config = tiny_config(tokens, **LORA | {"model.lora.targets": targets})
    trainer = Trainer(config, 0)
    assert trainer.frozen is not None
    before = [values.clone() for values in trainer.frozen.params]
    untrained = Trainer(changed(config, {"model.lora.rank": 0}), 0)
    ids = torch.arange(16).view(2, 8)
    assert torch.equal(logits(trainer, ids), logits(untrained, ids))  # B is 0
    for step in range(1, 5):
        trainer.step(step)
    assert all(torch.equal(*pair) for pair in zip(before, trainer.frozen.params, strict=True))
    adapters = {held.piece.record.name: held.view(trainer.buffers.params) for held in trainer.buffers.held()}
    assert len(adapters) == 2 * 2 * (7 if targets is None else 2)
    for held in untrained.buffers.held():
        name = held.piece.record.name.removesuffix("weight")
        if f"{name}lora_A.weight" in adapters:
            product = adapters[f"{name}lora_B.weight"] @ adapters[f"{name}lora_A.weight"]
            assert product.abs().max() > 1e-4
            held.view(untrained.buffers.params).add_(product, alpha=5.0 / 3)
    assert (logits(trainer, ids) - logits(untrained, ids)).abs().max() < 1e-14
    for part in (trainer, untrained):
        part.close()


def test_what_is_frozen_takes_no_memory_but_its_own(tokens: str) -> None:
    config = tiny_config(tokens, **LORA, **{"train.dtype": "bf16"})
    trainer = Trainer(config, 0)
    assert trainer.frozen is not None and not any(values.numel() for values in trainer.frozen.grads)
    trained = sum(len(values) for values in trainer.buffers.params)
    assert trained < 0.5 * sum(len(values) for values in trainer.frozen.params)
    assert {len(values) for parts in trainer.optimizer.tensors().values() for values in parts} <= {
        len(values) for values in trainer.buffers.params
    }
    assert all(parameter.grad.numel() == 0 for parameter in trainer.context.parameters if parameter.frozen)
    trainer.close()


def base_of(config: TrainConfig, folder: Path) -> str:
    """A checkpoint of trained weights."""
    run(0, 1, changed(config, {"model.lora.rank": 0}), 2, save_to=str(folder))
    return str(folder)


@pytest.mark.parametrize("layouts", [("tp2pp2", "dp2"), ("single", "tp4")])
def test_resumed_in_another_layout(layouts: tuple[str, str], pool: WorkerPool, tokens: str, tmp_path: Path) -> None:
    """Of a checkpoint that holds adapters alone; the base is read anew. Losses to rounding of sums, fp64."""
    plain = tiny_config(tokens, **LORA)
    values = {"model.lora.base": base_of(plain, tmp_path / "base")}
    configs = [tiny_config(tokens, layout, **LORA, **values, **{"parallel.zero": 1}) for layout in layouts]
    folder = str(tmp_path / "adapters")
    first = pool.run(run, configs[0].parallel.layout.world, configs[0], 2, None, folder)
    assert first[0].steps == 2
    manifest = read_manifest(tmp_path / "adapters" / "step-00000002")
    assert all("lora_" in name for name in manifest.parameters) and len(manifest.parameters) == 28
    going_on = pool.run(run, configs[1].parallel.layout.world, configs[1], 4, folder)
    whole = pool.run(run, 1, changed(configs[0], {f"parallel.{axis}": 1 for axis in ("tp", "pp", "dp")}), 4)
    expected = whole[0].losses[2:]
    sums = [sum(losses) for losses in zip(*(rank.losses for rank in going_on), strict=True)]
    assert sums == pytest.approx(expected, rel=1e-13)
    assert expected != pytest.approx(run(0, 1, plain, 4).losses[2:], rel=1e-4)  # the base counts


def test_refusals(pool: WorkerPool, tokens: str, tmp_path: Path) -> None:
    plain = tiny_config(tokens, **LORA)
    config = changed(plain, {"model.lora.base": base_of(plain, tmp_path / "base")})
    folder = tmp_path / "adapters"
    run(0, 1, config, 1, save_to=str(folder))
    [line] = pool.run(refused, 1, plain, str(folder))
    assert line.startswith("model.lora.base=null:") and "has adapters of other weights" in line
    [line] = pool.run(refused, 1, changed(config, {"model.lora.rank": 4}), str(folder))
    assert line.startswith("model.lora.rank=4:") and "was trained with 3" in line
    with pytest.raises(UserError, match="holds adapters alone; `megapar export` that run merged"):
        ModelPart(changed(config, {"model.lora.base": str(folder)}), 0)


@pytest.mark.parametrize(
    ("targets", "problem"),
    [(["q", "query"], "no such matrix in a layer; there are q"), ([], "nothing would be trained")],
)
def test_targets_are_checked(targets: list[str], problem: str, tokens: str) -> None:
    with pytest.raises(UserError, match=rf"^model.lora.targets=.*{problem}"):
        tiny_config(tokens, **LORA | {"model.lora.targets": targets})
