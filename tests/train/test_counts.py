"""What a step asks of a GPU: nothing in it makes the host wait."""

from typing import Any

import pytest

from megapar.config.schema import TrainConfig
from megapar.launch.pool import WorkerPool
from megapar.train.trainer import Trainer
from tests.tiny import GPT2, tiny_config
from tests.train.counting import counted


def syncs(rank: int, world_size: int, config: TrainConfig) -> dict[str, int]:
    trainer = Trainer(config, rank)
    found = counted(lambda: trainer.step(1))
    trainer.close()
    return dict(found.syncs)


@pytest.mark.parametrize("values", [{}, GPT2 | {"model.dropout": 0.1}], ids=["llama", "gpt2"])
def test_a_step_never_waits_for_the_device(values: dict[str, Any], interpreter: WorkerPool, tokens: str) -> None:
    """Each micro-batch reads the step's number, which the host has; loss and norm are looked at afterwards.

    Without clipping: on a CPU, and only there, it asks whether there is anything to clip.
    """
    small = {"model.layers": 1, "train.micro_batch_size": 1, "train.global_batch_size": 2, "optim.clip_grad": 0.0}
    config = tiny_config(tokens, **(values | small | {"train.dtype": "fp32", "kernels.backend": "interpret"}))
    assert interpreter.run(syncs, 1, config) == [{"_local_scalar_dense": 2}]


@pytest.mark.parametrize("method", ["int8_ef", "powersgd"])
def test_nor_does_one_that_may_have_to_forget_its_error_feedback(
    method: str, interpreter: WorkerPool, tokens: str
) -> None:
    small = {"model.layers": 1, "train.micro_batch_size": 1, "train.global_batch_size": 4, "optim.clip_grad": 0.0}
    values = small | {"train.dtype": "fp32", "kernels.backend": "interpret", "parallel.grad_compression": method}
    config = tiny_config(tokens, "dp2", **values)
    assert interpreter.run(syncs, 2, config) == [{"_local_scalar_dense": 2}] * 2
