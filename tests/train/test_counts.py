"""What a step asks of a GPU: nothing in it makes the host wait, and no gradients are put together."""

from typing import Any

import pytest

from megapar.config.schema import TrainConfig
from megapar.launch.pool import WorkerPool
from megapar.train.trainer import Trainer
from tests.tiny import GPT2, tiny_config
from tests.train.counting import Counted, counted


def syncs(rank: int, world_size: int, config: TrainConfig) -> dict[str, int]:
    return dict(step(config, rank, 1).syncs)


def kernels(rank: int, world_size: int, config: TrainConfig) -> dict[str, int]:
    return dict(step(config, rank, 2).kernels)


def step(config: TrainConfig, rank: int, number: int) -> Counted:
    """What the last of so many steps asks for."""
    trainer = Trainer(config, rank)
    for before in range(1, number):
        trainer.step(before)
    found = counted(lambda: trainer.step(number))
    trainer.close()
    return found


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


def test_main_gradients_are_written_and_not_cleared(interpreter: WorkerPool, tokens: str) -> None:
    """By the first micro-batch; but for the embedding's, whose rows are added to where tokens are."""
    small: dict[str, Any] = {"train.micro_batch_size": 1, "train.global_batch_size": 1, "optim.clip_grad": 0.0}
    config = tiny_config(tokens, **(small | {"train.dtype": "bf16", "kernels.backend": "interpret"}))
    assert interpreter.run(kernels, 1, config)[0]["zero_"] == 1


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("model", [{}, GPT2], ids=["llama", "gpt2"])
def test_a_layer_puts_no_gradients_together(
    model: dict[str, Any], recompute: str, interpreter: WorkerPool, tokens: str
) -> None:
    """Those of q, k and v are written where the fused projection's is, as are gate's and up's; of zeros there are none.
    A second layer brings no kernel of torch's but those that sum its weights' gradients and update them."""
    small = {"train.micro_batch_size": 1, "train.global_batch_size": 1, "optim.clip_grad": 0.0, "train.dtype": "bf16"}
    small |= {"kernels.backend": "interpret", "train.recompute": recompute}
    one, two = (
        interpreter.run(kernels, 1, tiny_config(tokens, **(model | small | {"model.layers": layers})))[0]
        for layers in (1, 2)
    )
    more = {name for name, count in two.items() if count > one.get(name, 0)}
    assert more <= {"add", "add_", "copy_", "pow_", "sum", "zero_"}
