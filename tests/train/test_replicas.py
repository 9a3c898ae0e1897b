"""Copies of a parameter that must be equal: one flipped bit is found within the step, and named."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megapar.config.errors import UserError
from megapar.config.schema import TrainConfig
from megapar.launch.pool import WorkerPool
from megapar.optim.optimizer import Optimizer
from megapar.train.loop import Loop
from tests.tiny import GPT2, tiny_config


def run_flipped(rank: int, world_size: int, config: TrainConfig, name: str, on: int) -> str | None:
    """The error that ends a run in which after step 2 a bit of a parameter flips on a rank, if it ends with one."""
    loop, plain = Loop(config, rank), Optimizer.start
    steps = 0

    def start(self: Optimizer, *args: Any, **options: Any) -> torch.Tensor:
        nonlocal steps
        norm, steps = plain(self, *args, **options), steps + 1
        if steps == 2 and rank == on:
            part = loop.trainer.buffers
            held = next(one for one in part.held() if one.piece.record.name == name)
            held.view(part.params).numpy().view("u8").reshape(-1)[-1] ^= 1 << 3
        return norm

    try:
        with mock.patch.object(Optimizer, "start", start):
            loop.run()
    except UserError as error:
        return str(error)
    return None


def config_of(tokens: str, folder: Path, layout: str, **values: Any) -> TrainConfig:
    given: dict[str, Any] = {"run.dir": str(folder), "logger.wandb.mode": "disabled", "train.steps": 3}
    return tiny_config(tokens, layout, **given | {"run.replicas_every": 1} | values)


TIED = GPT2 | {"model.layers": 2}


@pytest.mark.parametrize(
    ("layout", "values", "name", "on", "text"),
    [
        ("dp2", {}, "layers.0.mlp.down.weight", 1, "differs between ranks 0, 1, with no majority"),
        ("tp2", {}, "layers.1.norm2.weight", 1, "differs between ranks 0, 1, with no majority"),
        ("pp2", TIED, "embedding.weight", 0, "differs between ranks 0, 1, with no majority"),
        ("tp2dp2", {}, "layers.1.norm2.weight", 2, "on rank 2 differs from that on ranks 0, 1, 3"),
        ("tp4", {}, "layers.0.attention.k.weight", 3, "differs between ranks 2, 3, with no majority"),
    ],
    ids=["dp2", "tp2", "tied", "tp2dp2", "kv heads"],
)
def test_a_flipped_bit_is_named(
    layout: str,
    values: dict[str, Any],
    name: str,
    on: list[int],
    text: str,
    pool: WorkerPool,
    tokens: str,
    tmp_path: Path,
) -> None:
    config = config_of(tokens, tmp_path, layout, **values)
    said = pool.run(run_flipped, config.parallel.layout.world, config, name, on)
    assert len(set(said)) == 1 and said[0] is not None and "\n" not in said[0]
    assert said[0].startswith(f"step 2: copies of a parameter differ: {name} {text}; test that machine")


@pytest.mark.parametrize(
    ("layout", "values"),
    [
        ("tp2dp2", {"parallel.zero": 1, "train.dtype": "bf16"}),
        ("tp4", {"parallel.sequence_parallel": True}),
        pytest.param("pp2dp2", TIED | {"parallel.zero": 1}, marks=pytest.mark.more),
        pytest.param("pp2dp2", TIED, marks=pytest.mark.more),
        pytest.param("dp2", {"train.dtype": "bf16", "parallel.grad_compression": "powersgd"}, marks=pytest.mark.more),
        pytest.param("tp2pp2dp2", TIED | {"optim.name": "muon", "parallel.zero": 1}, marks=pytest.mark.more),
    ],
)
def test_equal_copies_are_silent(
    layout: str, values: dict[str, Any], pool: WorkerPool, tokens: str, tmp_path: Path
) -> None:
    config = config_of(tokens, tmp_path, layout, **values)
    assert set(pool.run(run_flipped, config.parallel.layout.world, config, "", -1)) == {None}


def test_a_state_whose_copies_differ_is_never_saved(pool: WorkerPool, tokens: str, tmp_path: Path) -> None:
    """Whatever `replicas_every` is: a run goes back to what was saved."""
    config = config_of(tokens, tmp_path, "dp2", **{"run.replicas_every": 1000, "checkpoint.every": 1})
    said = pool.run(run_flipped, 2, config, "layers.0.mlp.down.weight", 1)
    assert said[0] is not None and said[0].startswith("step 2: copies of a parameter differ: layers.0.mlp.down.weight")
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == ["step-00000001"]
