"""Steps from graphs have the bits of eager steps; each graph is captured once."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megapar.config.keys import changed
from megapar.config.schema import TrainConfig
from megapar.launch.pool import PoolError, WorkerPool
from megapar.pipeline.graphs import Graphs, why_not
from megapar.train import loop
from megapar.train.summary import summary_text
from megapar.train.trainer import Trainer
from tests.pipeline.recorded_graph import RecordedGraph
from tests.tiny import GPT2, tiny_config

STEPS = 3


def read_in_a_capture(compute: Any) -> float:
    with RecordedGraph().capture():
        return float(compute())


def test_a_stand_in_that_refuses_to_wait_for_the_device() -> None:
    """It lets through numbers of the host, which are there before anything is computed."""
    count, weight, x = torch.tensor(3), torch.tensor(2.0), torch.ones(4)
    waits: list[Any] = [
        lambda: weight,
        lambda: x.sum(),
        lambda: x[0],
        lambda: count * weight,
        lambda: (x > 0).sum() * count,
    ]
    for compute in waits:
        with pytest.raises(RuntimeError, match="can't wait for the device"):
            read_in_a_capture(compute)
    assert [read_in_a_capture(compute) for compute in (lambda: count, lambda: count * 2)] == [3.0, 6.0]


def train(rank: int, world_size: int, config: TrainConfig, graphs: bool) -> tuple[list[Any], list[int]]:
    """(losses, norms and what the steps leave; how many graphs there are after each)"""
    trainer = Trainer(config, rank)
    recorded = Graphs(trainer.context.weight_grads, trainer.mesh.timeline, lambda: None, RecordedGraph)
    trainer.executor.graphs = recorded if graphs else None
    found: list[Any] = []
    captured = []
    for step in range(1, STEPS + 1):
        done = trainer.step(step)
        found += [done.loss, done.result.grad_norm]
        captured.append(recorded.captured)
    left = torch.cat([*trainer.buffers.params, *trainer.buffers.grads, *trainer.optimizer.tensors()["exp_avg_sq"]])
    trainer.close()
    return [*found, left], captured


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "pp2": (2, {"train.global_batch_size": 12}),
    "dp2": (2, {"train.global_batch_size": 16, "parallel.bucket_size": 500, "parallel.zero": 1}),
    "pp2 zb_h1": (2, {"pipeline.schedule": "zb_h1", "train.global_batch_size": 12, **GPT2}),
    "pp2 zbv": (2, {"pipeline.schedule": "zbv", "model.layers": 4, **GPT2}),
    "pp2 interleaved": (2, {"pipeline.schedule": "interleaved", "model.layers": 4, "train.recompute": "full"}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_bits_are_those_of_eager_steps(name: str, pool: WorkerPool, tokens: str) -> None:
    ranks, values = LAYOUTS[name]
    config = tiny_config(tokens, name.split()[0], **values)
    plain = pool.run(train, ranks, config, False)
    graphed = pool.run(train, ranks, config, True)
    for (found, captured), (expected, none) in zip(graphed, plain, strict=True):
        assert found[:-1] == expected[:-1] and torch.equal(found[-1], expected[-1])
        assert captured == [captured[0]] * STEPS and captured[0] >= 2
        assert none == [0] * STEPS


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_the_bits_of_kernels_that_write_in_place(recompute: str, interpreter: WorkerPool, tokens: str) -> None:
    """q and k are turned in the projection's result: a replay finds it as the product before has left it."""
    small: dict[str, Any] = {"model.layers": 1, "train.dtype": "fp32", "kernels.backend": "interpret"}
    small |= {"train.global_batch_size": 4, "train.recompute": recompute}
    config = tiny_config(tokens, **small)
    [(found, captured)] = interpreter.run(train, 1, config, True, timeout=300)
    [(expected, _)] = interpreter.run(train, 1, config, False, timeout=300)
    assert found[:-1] == expected[:-1] and torch.equal(found[-1], expected[-1]) and captured[0] >= 2


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({}, None),
        ({"train.device": "cpu"}, "train.device=cpu"),
        ({"parallel.tp": 2}, "tp=2: a stage's collectives are inside"),
        ({"model.dropout": 0.1}, "model.dropout=0.1: its masks depend on the step"),
        ({"model.image.layers": 1}, "images and sound: every micro-batch has another shape"),
        ({"parallel.dp": 4}, "one micro-batch a step, and the last one runs without"),
        ({"parallel.pp": 2, "train.global_batch_size": 16}, None),
    ],
)
def test_what_forbids_graphs(values: dict[str, Any], reason: str | None, tokens: str) -> None:
    config = changed(tiny_config(tokens), {"train.device": "cuda", "train.cuda_graphs": "on"} | values)
    assert why_not(config) == reason


def run_asked(rank: int, world_size: int, config: TrainConfig) -> str:
    loop.Loop(config, rank).run()
    return summary_text(json.loads((Path(str(config.run.dir)) / "summary.json").read_text()), config)


def test_the_summary_says_what_forbids_them(pool: WorkerPool, tokens: str, tmp_path: Path) -> None:
    values: dict[str, Any] = {"train.cuda_graphs": "on", "train.steps": 1}
    values |= {"run.dir": str(tmp_path), "logger.wandb.mode": "disabled"}
    [said] = pool.run(run_asked, 1, tiny_config(tokens, **values))
    assert "CUDA graphs none: train.device=cpu\n" in said


def addresses(rank: int, world_size: int, config: TrainConfig) -> tuple[list[int], set[int]]:
    """Where gradients for the stage before lie, and a slot's own memory."""
    trainer = Trainer(config, rank)
    trainer.executor.graphs = graphs = Graphs(
        trainer.context.weight_grads, trainer.mesh.timeline, lambda: None, RecordedGraph
    )
    given: list[int] = []
    backward = graphs.backward

    def watched(*args: Any, **options: Any) -> Any:
        result = backward(*args, **options)
        given.extend(tensor.data_ptr() for tensor in result.values())
        return result

    graphs.backward = watched  # type: ignore[method-assign]
    trainer.step(1)
    slots = [slot for free in graphs._free.values() for slot in free.values()]
    captured = [one.result for slot in slots for name, one in slot.graphs.items() if name in ("B", "I")]
    trainer.close()
    return given, {tensor.data_ptr() for result in captured for tensor in result.values()}


def test_what_is_sent_is_not_a_slots_memory(pool: WorkerPool, tokens: str) -> None:
    """The slot's next pass would write there while the message is under way."""
    _, (given, own) = pool.run(addresses, 2, tiny_config(tokens, "pp2"))
    assert given and own and not own.intersection(given)


def test_a_graph_that_finds_other_gradients_empty_is_an_error(pool: WorkerPool, tokens: str) -> None:
    """A replay writes or adds as it was captured: never the one for the other."""
    with pytest.raises(PoolError, match="captured with other main gradients empty"):
        pool.run(empty_in_between, 1, tiny_config(tokens))


def empty_in_between(rank: int, world_size: int, config: TrainConfig) -> None:
    trainer = Trainer(config, rank)
    weight_grads = trainer.context.weight_grads
    trainer.executor.graphs = graphs = Graphs(weight_grads, trainer.mesh.timeline, lambda: None, RecordedGraph)
    trainer.step(1)
    replay = graphs._run

    def emptied(slot: Any, name: str, compute: Any) -> Any:
        if name == "B":
            weight_grads.begin([])
        return replay(slot, name, compute)

    graphs._run = emptied  # type: ignore[method-assign]
    trainer.step(2)
