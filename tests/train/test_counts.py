"""What a step asks of a GPU: nothing in a micro-batch makes the host wait for it."""

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
def test_no_micro_batch_waits_for_the_device(values: dict[str, Any], interpreter: WorkerPool, tokens: str) -> None:
    """Each micro-batch reads the step's number, which the host has. The step reads the norm and its loss."""
    small = {"model.layers": 1, "train.micro_batch_size": 1, "train.global_batch_size": 2}
    config = tiny_config(tokens, **(values | small | {"train.dtype": "fp32", "kernels.backend": "interpret"}))
    assert interpreter.run(syncs, 1, config) == [{"_local_scalar_dense": 2 + 2}]
