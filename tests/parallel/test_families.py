"""What only some families have, in layouts: losses, gradients and weights of the one-process run."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megapar.config.keys import changed
from megapar.config.layout import Layout
from megapar.config.model_schema import RopeScalingConfig
from megapar.launch.pool import WorkerPool
from megapar.operations import check_operations
from megapar.parallel.grad_sync import GradSync
from megapar.part import ModelPart
from megapar.pipeline.executor import Executor
from megapar.schedule.build import build
from tests.models.families import FAMILIES, LLAMA3
from tests.pairwise import pairwise, parameters
from tests.parallel.layouts import compare, verify_config

OPTIONS: dict[str, list[Any]] = {
    "family": list(FAMILIES),
    "layout": ["tp2", "tp2pp2", "tp3dp2", "pp4"],
    "model.kv_heads": [1, 4, 12],
    "parallel.sequence_parallel": [False, True],
    "train.recompute": ["none", "selective", "full"],
    "pipeline.schedule": ["1f1b", "zb_h1"],
}


def divides(case: dict[str, Any]) -> bool:
    tp = Layout.parse(case["layout"])["tp"]
    return case["model.kv_heads"] % tp == 0 or tp % case["model.kv_heads"] == 0


@pytest.mark.parametrize("case", parameters(pairwise(OPTIONS, divides), "family", "layout"))
def test_a_family_in_a_layout(case: dict[str, Any], pool: WorkerPool, prefix: str, tmp_path: Path) -> None:
    values = FAMILIES[case["family"]] | {key: value for key, value in case.items() if "." in key}
    [verdict] = compare(pool, tmp_path, verify_config(prefix, [case["layout"]], **values))
    assert verdict.passed, verdict


@pytest.mark.parametrize("family", FAMILIES)
def test_their_operations(family: str, prefix: str) -> None:
    values = FAMILIES[family] | {"model.layers": 2, "model.kv_heads": 2, "model.heads": 4, "model.hidden": 16}
    found = check_operations(verify_config(prefix, ["tp2"], **values))
    assert found.wrong == [] and found.not_alone == [] and found.error < 5e-7


@pytest.mark.parametrize(
    "scaling", [LLAMA3, {"kind": "linear", "factor": 3.0}, {"kind": "dynamic", "factor": 2.0, "original_length": 5}]
)
def test_scaled_positions_in_a_layout(scaling: dict[str, Any], pool: WorkerPool, prefix: str, tmp_path: Path) -> None:
    values = {"model.rope_scaling": RopeScalingConfig(**scaling), "model.heads": 4, "model.hidden": 24}
    [verdict] = compare(pool, tmp_path, verify_config(prefix, ["tp2pp2"], **values))
    assert verdict.passed, verdict


# ------------------------------------------------------------------------------------------------ hidden states, pooled
def pooled_gradients(rank: int, world_size: int, config: Any) -> dict[str, tuple[list[list[int]], torch.Tensor]]:
    """This rank's gradients after a backward from hidden and pooled states: (box, values) by name."""
    part = ModelPart(config, rank)
    sync = GradSync(part.buffers)
    executor = Executor(part.stages, part.mesh, part.context.weight_grads, reduce=sync.finish)
    random = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 61, (2, 12), generator=random)
    weights = (
        torch.randn(24, 24, dtype=torch.float64, generator=random),
        torch.randn(2, 24, dtype=torch.float64, generator=random),
    )
    types = torch.arange(12).div(7, rounding_mode="floor").expand(2, 12).contiguous()
    batch = {"ids": ids, "samples": torch.arange(2), "step": torch.tensor(1), "types": types}

    def loss(outputs: dict[str, torch.Tensor], batch: Any) -> torch.Tensor:
        return (outputs["hidden"] * weights[0]).sum() + (outputs["pooled"] * weights[1]).sum()

    schedule = build("1f1b", config.parallel.pp, 1)
    sync.start(schedule)
    executor.run(schedule, [batch], loss)
    found = {}
    for held in part.buffers.held():
        box = [[place.start, place.stop] for place in held.piece.shard.box]
        found[held.piece.record.name] = (box, held.view(part.buffers.grads).clone())
    part.close()
    return found


@pytest.mark.parametrize("layout", ["tp2", "tp2pp2"])
@pytest.mark.parametrize("split", [False, True])
def test_a_pooler_in_a_layout(layout: str, split: bool, pool: WorkerPool, prefix: str) -> None:
    """fp64; sums in another order reach 1e-15 of the largest gradient. (That of a bias of k is 0 but for rounding.)"""
    values = FAMILIES["bert"] | {"model.output": "hidden", "model.pooler": True, "model.tied": False}
    values |= {"model.output_bias": False, "model.layers": 2, "parallel.sequence_parallel": split}
    config = verify_config(prefix, [layout], **values)
    whole = pooled_gradients(0, 1, config)
    axes = {f"parallel.{axis}": size for axis, size in Layout.parse(layout).items()}
    seen, largest = set(), max(float(gradient.abs().max()) for _, gradient in whole.values())
    for found in pool.run(pooled_gradients, Layout.parse(layout).world, changed(config, axes)):
        for name, (box, gradient) in found.items():
            expected = whole[name][1][tuple(slice(*place) for place in box)]
            seen.add(name)
            assert (gradient - expected).abs().max() <= 1e-13 * largest, name
    assert seen == whole.keys() and "pooler.weight" in seen
