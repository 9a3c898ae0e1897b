"""A rehearsal launches every kernel of a step, leaves nothing behind, and comes before a GPU's first step."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

from megapar.config.schema import TrainConfig
from megapar.kernels import _common
from megapar.launch.pool import WorkerPool
from megapar.pipeline.executor import Executor
from megapar.train.trainer import Trainer
from tests.tiny import GPT2, tiny_config

Launched = set[tuple[str, str]]


def _given(value: Any) -> str:
    """What of an argument a compilation depends on, and more: the values of all numbers."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}, {'aligned' if value.data_ptr() % 16 == 0 else 'not aligned'}"
    return repr(value) if isinstance(value, int | float | str | None) else type(value).__name__


def launched(run: Callable[[], Any]) -> Launched:
    """What the compiler would be given for each launch: a kernel, and its arguments."""
    found: Launched = set()
    launch = _common.Launch.run

    def noted(self: _common.Launch) -> None:
        given = {name: _given(value) for name, value in self.arguments.items()}
        found.add((self.kernel.fn.__name__, str(sorted(given.items()))))
        launch(self)

    with mock.patch.object(_common.Launch, "run", noted):
        run()
    return found


def one_step(rank: int, world_size: int, config: TrainConfig, rehearsed: bool) -> tuple[Launched, Launched, list[Any]]:
    """(launches of the rehearsal, of a step, what the step leaves)"""
    trainer = Trainer(config, rank)
    before = launched(trainer.rehearse) if rehearsed else set()
    results: list[Any] = []
    during = launched(lambda: results.append(trainer.step(1)))
    left = [results[0].loss, results[0].result.grad_norm, torch.cat(trainer.buffers.params)]
    trainer.close()
    return before, during, left


@pytest.mark.parametrize(
    ("layout", "values"),
    [
        ("tp2", {"model.layers": 1, "parallel.sequence_parallel": True, "train.recompute": "full"}),
        ("pp2", GPT2 | {"pipeline.schedule": "zbv", "model.layers": 4, "model.dropout": 0.1}),
    ],
)
def test_a_rehearsal_is_complete_and_leaves_nothing(
    layout: str, values: dict[str, Any], interpreter: WorkerPool, tokens: str
) -> None:
    interpreted = {"train.dtype": "fp32", "kernels.backend": "interpret", "train.micro_batch_size": 1}
    config = tiny_config(tokens, layout, **(interpreted | {"train.global_batch_size": 2} | values))
    rehearsed = interpreter.run(one_step, 2, config, True)
    plain = interpreter.run(one_step, 2, config, False)
    for (before, during, left), (_, _, expected) in zip(rehearsed, plain, strict=True):
        assert during and during <= before
        assert left[:2] == expected[:2] and torch.equal(left[2], expected[2])


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_trainer_on_a_gpu_rehearses_before_its_first_phase(device: str, tokens: str) -> None:
    """The GPU is a name here, which the mesh has from when all tensors are made until the rehearsal begins."""
    calls: list[str] = []

    class NotedExecutor(Executor):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.mesh.device = torch.device(device)

        def rehearse(self, *args: Any) -> None:
            calls.append("rehearse")
            super().rehearse(*args)

        def run(self, *args: Any) -> Any:
            calls.append("run")
            return super().run(*args)

    class OnHost(Trainer):
        def rehearse(self) -> None:
            self.mesh.device = torch.device("cpu")
            super().rehearse()

    with mock.patch("megapar.train.trainer.Executor", NotedExecutor):
        trainer = OnHost(tiny_config(tokens), 0)
    trainer.mesh.device = torch.device("cpu")
    trainer.step(1)
    trainer.close()
    assert calls == {"cuda": ["rehearse", "rehearse", "run"], "cpu": ["run"]}[device]
