"""What the pool's ranks do in the tests of generation."""

from typing import Any

import torch

from megapar.config.errors import UserError
from megapar.config.schema import GenerateConfig, SampleConfig, TrainConfig
from megapar.console import set_console
from megapar.generate.run import run_rank
from megapar.generate.tokens import generate_tokens
from megapar.train.trainer import Trainer


def trained(config: TrainConfig, rank: int, steps: int) -> Trainer:
    """A trainer after some steps, so that biases are not zero."""
    trainer = Trainer(config, rank)
    for step in range(1, steps + 1):
        trainer.step(step)
    return trainer


def continuations(
    rank: int, world_size: int, config: TrainConfig, prompt: list[int], samples: list[SampleConfig], steps: int = 1
) -> list[list[int]]:
    """One continuation for each way to sample."""
    trainer = trained(config, rank, steps)
    length = config.train.seq_length
    found = [
        generate_tokens(trainer.executor, trainer.context, prompt, sample, context_length=length) for sample in samples
    ]
    trainer.close()
    return found


def broken_weights(rank: int, world_size: int, config: TrainConfig) -> str:
    """The line with which a model of infinite weights is refused."""
    trainer = Trainer(config, rank)
    torch._foreach_mul_(trainer.buffers.params, torch.inf)
    try:
        generate_tokens(trainer.executor, trainer.context, [1], SampleConfig(), context_length=8)
    except UserError as error:
        return str(error)
    finally:
        trainer.close()
    return "not refused"


def generate(rank: int, world_size: int, config: GenerateConfig) -> Any:
    """The command's rank, silent unless `out` is set; the line if it refuses."""
    set_console(None)
    try:
        run_rank(config, rank, world_size)
    except UserError as error:
        return str(error)
    return None
