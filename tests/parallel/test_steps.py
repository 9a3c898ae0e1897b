"""What holds in every step beyond equal numbers: repeatability, tied copies, skipped steps, plain modules, memory."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from megapar.config.schema import TrainConfig
from megapar.launch.pool import WorkerPool
from megapar.models.stage import build_stage
from megapar.parallel.context import StageContext
from megapar.schedule.actions import Action
from megapar.schedule.lower import lower
from megapar.train.metrics import gather_figures, local_figures, summarise
from megapar.train.trainer import Trainer
from tests.tiny import tiny_config


def losses_and_sum(rank: int, world_size: int, config: TrainConfig) -> list[Any]:
    trainer = Trainer(config, rank)
    history: list[Any] = []
    for step in range(1, config.train.steps + 1):
        done = trainer.step(step)
        figures = gather_figures(local_figures(done.loss, done.spans), trainer.mesh)
        history.append((summarise(figures)["loss"], done.result.grad_norm))
    history.append(torch.cat(trainer.buffers.params))
    trainer.close()
    return history


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_repeated_run_is_bitwise_equal(dtype: str, pool: WorkerPool, prefix: str) -> None:
    values = {"train.dtype": dtype, "parallel.zero": 1, "parallel.sequence_parallel": True, "model.dropout": 0.1}
    config = tiny_config(prefix, "tp2pp2dp2", **values)
    first, second = (pool.run(losses_and_sum, 8, config) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert one[:-1] == other[:-1]
        assert torch.equal(one[-1], other[-1])
    assert first[0][:-1] == first[7][:-1]  # loss and norm are known on every rank alike


def test_bf16_learns_like_fp32(pool: WorkerPool, prefix: str) -> None:
    """Same run in bf16 with fp32 masters: losses agree to bf16's three digits, in one process and in 3D."""
    layouts = ["single", "tp2pp2dp2"]
    values: dict[str, Any] = {"parallel.zero": 1, "train.steps": 8}
    wide = pool.run(losses_and_sum, 1, tiny_config(prefix, **{"train.dtype": "fp32", **values}))[0]
    for layout in layouts:
        config = tiny_config(prefix, layout, **{"train.dtype": "bf16", **values})
        narrow = pool.run(losses_and_sum, 8 if layout != "single" else 1, config)[0]
        for (loss, _), (expected, _) in zip(narrow[:-1], wide[:-1], strict=True):
            assert loss == pytest.approx(expected, rel=5e-3)


def tied_copies(rank: int, world_size: int, config: TrainConfig) -> list[torch.Tensor]:
    trainer = Trainer(config, rank)
    copies = []
    for step in (1, 2, 3):
        trainer.step(step)
        copies += [
            parameter.tensor.detach().clone()
            for parameter in trainer.context.parameters
            if parameter.pieces[0].record.tie
        ]
    trainer.close()
    return copies


@pytest.mark.parametrize("layout", ["pp2", "pp4dp2", "tp2pp2dp2"])
def test_tied_copies_stay_bitwise_equal(layout: str, pool: WorkerPool, prefix: str) -> None:
    config = tiny_config(
        prefix, layout, **{"model.tied": True, "model.layers": 4, "train.dtype": "fp32", "parallel.zero": 1}
    )
    parallel = config.parallel
    assert parallel.dp is not None
    ranks = pool.run(tied_copies, parallel.tp * parallel.pp * parallel.dp, config)
    per_stage = parallel.dp * parallel.tp
    for first, last in zip(ranks[:per_stage], ranks[-per_stage:], strict=True):
        assert len(first) == len(last) == 3
        assert all(torch.equal(a, b) for a, b in zip(first, last, strict=True))
    assert all(not middle for middle in ranks[per_stage:-per_stage])


def step_with_nan(rank: int, world_size: int, config: TrainConfig) -> list[Any]:
    """Rank 0 alone gets a NaN into one gradient of step 2."""
    trainer = Trainer(config, rank)
    before: list[Any] = []

    def poison() -> None:
        if rank == 0 and len(before) == 1:
            trainer.sync.owned[0][3] = float("nan")

    skipped = []
    for step in (1, 2, 3):
        result = trainer.step(step, poison).result
        skipped.append(result.skipped)
        state = trainer.optimizer.tensors()
        before.append([torch.cat(t) for t in (trainer.buffers.params, *state.values())])
    equal = [torch.equal(a, b) for a, b in zip(before[0], before[1], strict=True)]
    updates = trainer.optimizer.steps
    moved = not torch.equal(before[1][0], before[2][0])
    trainer.close()
    return [skipped, equal, updates, moved]


@pytest.mark.parametrize(("zero", "optimizer"), [(0, "adamw"), (1, "adamw"), (1, "muon"), (0, "lion")])
def test_a_step_that_is_not_finite_is_skipped_on_all_ranks(
    zero: int, optimizer: str, pool: WorkerPool, prefix: str
) -> None:
    config = tiny_config(prefix, "tp2pp2dp2" if zero else "tp2pp2", **{"parallel.zero": zero, "optim.name": optimizer})
    for skipped, equal, updates, moved in pool.run(step_with_nan, 8 if zero else 4, config):
        assert skipped == [False, True, False]
        assert all(equal)
        assert updates == 2
        assert moved


class Adapter(nn.Module):
    """A user's plain module behind a layer: it knows nothing of megapar."""

    def __init__(self, layer: nn.Module, hidden: int) -> None:
        super().__init__()
        self.layer = layer
        self.extra = nn.Linear(hidden, hidden)

    def forward(self, x: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        x = self.layer(x, batch)
        return x + torch.tanh(self.extra(x))


def stage_with_adapters(config: TrainConfig, context: StageContext) -> Any:
    stage: Any = build_stage(config, context)
    for name, layer in list(stage.layers.items()):
        stage.layers[name] = Adapter(layer, config.model.hidden).to(context.dtype)
    return stage


def plain_gradients(rank: int, world_size: int, config: TrainConfig) -> dict[str, torch.Tensor]:
    trainer = Trainer(config, rank, stage_with_adapters)
    found: dict[str, torch.Tensor] = {}

    def keep() -> None:
        for held in trainer.buffers.held():
            if ".extra." in held.piece.record.name:
                found[held.piece.record.name] = held.view(trainer.buffers.grads).clone()

    trainer.step(1, keep)
    for held in trainer.buffers.held():
        if held.parameter.attribute == "weight" and ".extra." in held.parameter.name:
            found["value " + held.parameter.name] = held.view(trainer.buffers.params).clone()
    trainer.close()
    return found


@pytest.mark.parametrize("layout", ["pp2", "tp2", "tp2pp2dp2"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_plain_module_trains_in_every_layout(
    layout: str, sequence_parallel: bool, pool: WorkerPool, prefix: str
) -> None:
    expected = pool.run(plain_gradients, 1, tiny_config(prefix))[0]
    assert len(expected) == 6  # weight, bias and updated weight of two layers
    config = tiny_config(prefix, layout, **{"parallel.sequence_parallel": sequence_parallel})
    assert config.parallel.dp is not None
    world = config.parallel.tp * config.parallel.pp * config.parallel.dp
    seen = set()
    for found in pool.run(plain_gradients, world, config):
        seen |= found.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-14)
    assert seen == expected.keys()


class Special(nn.Module):
    """What a user's module may also hold: a shared weight, a frozen one, a buffer, a scalar."""

    scale: torch.Tensor

    def __init__(self, embedding: Any, hidden: int) -> None:
        super().__init__()
        self.embedding, self.tokens = embedding, embedding.tokens
        self.one, self.other, self.frozen = (nn.Linear(hidden, hidden, bias=False) for _ in range(3))
        self.other.weight = self.one.weight
        self.frozen.weight.requires_grad_(False)
        self.gain = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("scale", torch.full((hidden,), 0.5))

    def forward(self, ids: torch.Tensor, tokens: Any) -> torch.Tensor:
        x = self.embedding(ids, tokens)
        return x + self.frozen(self.other(torch.tanh(self.one(x)))) * self.scale * self.gain


def special_stage(config: TrainConfig, context: StageContext) -> Any:
    stage: Any = build_stage(config, context)
    if stage.embedding is not None:
        stage.embedding = Special(stage.embedding, config.model.hidden)
    return stage


def special_parameters(rank: int, world_size: int, config: TrainConfig) -> tuple[torch.Tensor, ...]:
    trainer = Trainer(config, rank, special_stage)
    stage: Any = trainer.stages[0]
    module = stage.embedding
    before = module.frozen.weight.clone(), module.gain.clone()
    for step in (1, 2):
        trainer.step(step)
    assert module.one.weight is module.other.weight
    assert torch.equal(module.frozen.weight, before[0]) and not torch.equal(module.gain, before[1])
    found = module.one.weight.detach().clone(), module.frozen.weight.detach().clone(), module.gain.detach().clone()
    trainer.close()
    return found


@pytest.mark.parametrize("dtype", ["fp64", "bf16"])
def test_shared_and_frozen_parameters_of_a_plain_module(dtype: str, pool: WorkerPool, prefix: str) -> None:
    one, two = (
        pool.run(special_parameters, world, tiny_config(prefix, layout, **{"train.dtype": dtype}))
        for world, layout in ((1, "single"), (2, "dp2"))
    )
    for copy in two:
        for value, expected in zip(copy, one[0], strict=True):
            torch.testing.assert_close(
                value, expected, rtol=2e-2 if dtype == "bf16" else 1e-9, atol=1e-3 if dtype == "bf16" else 1e-14
            )


def split_backward(rank: int, world_size: int, config: TrainConfig) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Gradients of one step with B, and with every B split into I and, at the end, W."""
    trainer = Trainer(config, rank)
    gradients = []
    trainer.step(1, lambda: gradients.append(torch.cat(trainer.sync.owned)))
    other = Trainer(config, rank)
    rows = []
    for row in trainer.schedule.rows:
        compute = [action for action in row if action.kind in ("F", "B")]
        split = [Action(a.stage, "I", a.microbatch) if a.kind == "B" else a for a in compute]
        rows.append(split + [Action(a.stage, "W", a.microbatch) for a in compute if a.kind == "B"])
    other.schedule = lower(rows, len(rows), other.schedule.microbatches)
    other.step(1, lambda: gradients.append(torch.cat(other.sync.owned)))
    queued = len(other.context.weight_grads._queued)
    trainer.close()
    other.close()
    return gradients[0], gradients[1], queued


@pytest.mark.parametrize("layout", ["single", "pp2", "tp2pp2dp2"])
def test_input_and_weight_gradients_apart_equal_the_full_backward(layout: str, pool: WorkerPool, prefix: str) -> None:
    world = {"single": 1, "pp2": 2, "tp2pp2dp2": 8}[layout]
    config = tiny_config(prefix, layout, **{"train.dtype": "fp32", "model.tied": True})
    for whole, split, queued in pool.run(split_backward, world, config):
        assert torch.equal(whole, split)
        assert queued == 0


def alive_outputs(rank: int, world_size: int, config: TrainConfig) -> int:
    """How many of this stage's sent activations still hold memory when its last forward has run."""
    trainer = Trainer(config, rank)
    outputs: list[weakref.ref] = []
    stage: Any = next(iter(trainer.stages.values()))
    original: Callable = stage.forward
    alive = -1

    def forward(received: Any, batch: Any) -> Any:
        result = original(received, batch)
        outputs.extend(weakref.ref(tensor.untyped_storage()) for tensor in result.values())
        return result

    stage.forward = forward
    backward = trainer.executor

    def count() -> None:
        nonlocal alive
        gc.collect()
        alive = sum(reference() is not None for reference in outputs)

    assert backward is not None
    trainer.step(1, count)
    trainer.close()
    return alive


def test_sent_activations_are_released(pool: WorkerPool, prefix: str) -> None:
    config = tiny_config(prefix, "pp2", **{"pipeline.schedule": "gpipe"})
    assert pool.run(alive_outputs, 2, config)[0] == 0
