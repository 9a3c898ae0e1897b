"""Backward in two parts, I and W: what runs in which, and that every schedule gives 1F1B's gradients bit by bit."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megapar.config.schema import TrainConfig
from megapar.launch.pool import WorkerPool
from megapar.models.stage import build_stage
from megapar.parallel.context import StageContext
from megapar.schedule.actions import Action
from megapar.schedule.build import build, default_chunks, generators
from megapar.train.trainer import Trainer
from tests.tiny import GPT2, tiny_config

MATMULS = ("mm", "addmm", "addmm_", "bmm", "baddbmm")
Found = Counter[tuple[str, tuple[int, ...]]]  # (operation, shape of its result)


class Recorder(TorchDispatchMode):
    """Counts matmuls and collectives by the action that runs them."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__()
        self.matmuls: dict[str, Found] = defaultdict(Counter)
        self.collectives: dict[str, Found] = defaultdict(Counter)
        self.action: str | None = None
        self.span = trainer.mesh.timeline.span
        trainer.mesh.timeline.span = self.named_span  # type: ignore[method-assign]

    @contextmanager
    def named_span(
        self, kind: str, name: str, where: str = "", *, fine: bool = False, waiting: bool = False
    ) -> Iterator[None]:
        if kind in ("F", "B", "I", "W"):
            self.action = name
        with self.span(kind, name, where, fine=fine, waiting=waiting):
            yield
        if self.action == name:
            self.action = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__
        if self.action is not None and name in MATMULS:
            self.matmuls[self.action][name, tuple(result.shape)] += 1
        if self.action is not None and func.namespace == "c10d":
            self.collectives[self.action][name, ()] += 1
        return result


def count(rank: int, world_size: int, config: TrainConfig) -> tuple[Any, ...]:
    """(matmuls, collectives) by action of one step, and the shapes of this rank's matrices."""
    trainer = Trainer(config, rank)
    with Recorder(trainer) as recorder:
        trainer.step(1)
    multiplied = [parameter for parameter in trainer.context.parameters if parameter.attribute == "weight"]
    shapes = {parameter.shape for parameter in multiplied if "positions" not in parameter.name}
    trainer.close()
    return dict(recorder.matmuls), dict(recorder.collectives), shapes


@pytest.mark.parametrize("style", ["llama", "gpt2"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_what_runs_in_i_and_what_in_w(style: str, sequence_parallel: bool, pool: WorkerPool, prefix: str) -> None:
    """10 tokens of a micro-batch are no matrix's dimension, so a result's shape says whose gradient it is.

    The last micro-batch is left out: its weight gradients complete buckets, whose reduction then starts.
    """
    values = (GPT2 if style == "gpt2" else {}) | {"train.seq_length": 10, "train.micro_batch_size": 1}
    values |= {"parallel.sequence_parallel": sequence_parallel, "model.layers": 4}
    whole, split = (
        pool.run(count, 4, tiny_config(prefix, "tp2pp2", **values, **{"pipeline.schedule": name}))
        for name in ("1f1b", "zb_h1")
    )
    seen = 0
    for (matmuls, collectives, shapes), (of_b, collectives_of_b, _) in zip(split, whole, strict=True):
        assert not any(10 in shape for shape in shapes)
        for text in matmuls:
            stage, kind, m = Action.parse(text)
            if kind != "W" or m == 7:
                continue
            seen += 1
            i, w, b = (str(Action(stage, kind, m)) for kind in "IWB")
            assert not [shape for _, shape in matmuls[i] if shape in shapes]
            assert [shape for _, shape in matmuls[w] if shape not in shapes] == []
            assert w not in collectives
            assert collectives[i] == collectives_of_b[b]
            assert matmuls[i] + matmuls[w] == of_b[b]
            assert matmuls[w].total() == sum(shape in shapes for _, shape in of_b[b].elements()) > 0
    assert seen > 4


def gradients(rank: int, world_size: int, config: TrainConfig, compiled: bool = False) -> dict[str, Tensor]:
    """The reduced gradients of this rank's parameters in the first step."""

    def built(config: TrainConfig, context: StageContext) -> Any:
        stage = build_stage(config, context)
        if compiled:
            stage.compile(backend="aot_eager")
        return stage

    trainer = Trainer(config, rank, built)
    found: dict[str, Tensor] = {}

    def keep() -> None:
        for held in trainer.buffers.held():
            found[held.piece.record.name] = held.view(trainer.buffers.grads).clone()

    trainer.step(1, keep)
    trainer.close()
    return found


def all_gradients(pool: WorkerPool, config: TrainConfig, compiled: bool = False) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for rank in pool.run(gradients, config.parallel.pp, config, compiled):
        found |= rank
    return found


def fp32_config(prefix: str, name: str) -> TrainConfig:
    values = {"train.dtype": "fp32", "model.layers": 8, "pipeline.schedule": name}
    return tiny_config(prefix, "pp4", **values, **{"train.global_batch_size": 8, "train.micro_batch_size": 1})


def in_order(name: str, config: TrainConfig) -> bool:
    """Every stage adds the weight gradients of its micro-batches up in their order, as 1F1B does."""
    schedule = build(name, 4, 8, chunks=default_chunks(name))
    of_stage: dict[int, list[int]] = defaultdict(list)
    for row in schedule.rows:
        for stage, kind, m in row:
            if kind in ("B", "W"):
                of_stage[stage].append(m)
    return all(order == sorted(order) for order in of_stage.values())


@pytest.mark.parametrize("name", sorted(generators()))
def test_gradients_are_those_of_1f1b_bit_by_bit(name: str, pool: WorkerPool, prefix: str) -> None:
    expected = all_gradients(pool, fp32_config(prefix, "1f1b"))
    config = fp32_config(prefix, name)
    found = all_gradients(pool, config)
    assert found.keys() == expected.keys()
    assert in_order(name, config)  # of the built-in ones all do; another order would be equal within rounding
    assert [key for key in found if not torch.equal(found[key], expected[key])] == []


def compiled_gradients(rank: int, world_size: int, config: TrainConfig) -> tuple[dict[str, Tensor], int]:
    import torch._dynamo as dynamo
    from torch._dynamo.utils import counters

    dynamo.reset()
    counters.clear()
    found = gradients(rank, world_size, config, compiled=True)
    return found, counters["stats"]["unique_graphs"]


@pytest.mark.more
def test_compiled_stages_split_backward_too(pool: WorkerPool, prefix: str) -> None:
    """Graphs end at ops that own weights, so what is fused are norms, attention and activations: another rounding."""
    config = tiny_config(prefix, "pp2", **{"train.dtype": "fp32", "pipeline.schedule": "zb_h1"})
    eager = all_gradients(pool, config)
    for found, graphs in pool.run(compiled_gradients, 2, config):
        assert graphs > 2
        for name, grad in found.items():
            # fp32 over a chain of about ten sums of 16 to 64 terms: some 10 units of 6e-8 of the largest element
            torch.testing.assert_close(grad, eager[name], rtol=0, atol=2e-6 * float(eager[name].abs().max()))
