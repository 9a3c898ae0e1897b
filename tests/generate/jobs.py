"""What the pool's ranks do in the tests of generation."""

import io
import os
from collections.abc import Collection, Sequence
from typing import Any
from unittest import mock

import torch

import megapar.generate.chat
from megapar.config.errors import UserError
from megapar.config.run_schema import ChatConfig, GenerateConfig, SampleConfig
from megapar.config.schema import TrainConfig
from megapar.console import set_console, set_typed
from megapar.generate.choose import choose
from megapar.generate.run import run_rank
from megapar.generate.tokens import Generator, Text, generate_tokens
from megapar.train.trainer import Trainer

Written = tuple[list[int], list[float]]  # tokens and their log-probabilities


def trained(config: TrainConfig, rank: int, steps: int) -> Trainer:
    """A trainer after some steps, so that biases are not zero."""
    trainer = Trainer(config, rank)
    for step in range(1, steps + 1):
        trainer.step(step)
    return trainer


def generator(trainer: Trainer, texts: int = 1, **options: Any) -> Generator:
    length = trainer.config.train.seq_length
    return Generator(trainer.stages, trainer.context, context_length=length, texts=texts, **options)


def continuations(
    rank: int,
    world_size: int,
    config: TrainConfig,
    prompts: list[list[int]],
    samples: list[SampleConfig],
    texts: int,
    steps: int = 1,
) -> list[Written]:
    """What follows each prompt, `texts` of them at a time."""
    trainer = trained(config, rank, steps)
    found = [Text(prompt, sample) for prompt, sample in zip(prompts, samples, strict=True)]
    ended = list(generator(trainer, texts).write(found))
    assert {id(text) for text in ended} == {id(text) for text in found}
    trainer.close()
    return [(text.written, text.logprobs) for text in found]


def recomputed(
    rank: int,
    world_size: int,
    config: TrainConfig,
    prompts: list[list[int]],
    samples: list[SampleConfig],
    steps: int = 1,
) -> list[Written]:
    """The same by definition, in one process: the whole context anew for every token of every text."""
    trainer = trained(config, rank, steps)
    [stage] = trainer.stages.values()
    stage.train(False)
    written = []
    for prompt, sample in zip(prompts, samples, strict=True):
        tokens, logprobs = list(prompt), []
        for _ in range(sample.max_tokens):
            seen = in_context(tokens, config.train.seq_length)
            # Padded: a token sees none behind it, and scaled rotary positions are those of samples in training.
            ids = torch.tensor([seen + [0] * (config.train.seq_length - len(seen))])
            batch = {"ids": ids, "samples": torch.zeros(1, dtype=torch.int64), "step": torch.tensor(0)}
            with torch.no_grad():
                logits = stage({}, batch)["logits"][len(seen) - 1]
            tokens.append(choose(logits.numpy(), sample, len(tokens)))
            logprobs.append(float(torch.log_softmax(logits, 0)[tokens[-1]]))
        written.append((tokens[len(prompt) :], logprobs))
    trainer.close()
    return written


def in_context(tokens: Sequence[int], length: int) -> list[int]:
    """The tokens that the next one sees: as long as there are too many, the first quarter of a context leaves."""
    seen = list(tokens)
    while len(seen) > length:
        seen = seen[(length + 3) // 4 :]
    return seen


def broken_weights(rank: int, world_size: int, config: TrainConfig) -> str:
    """The line with which a model of infinite weights is refused."""
    trainer = Trainer(config, rank)
    torch._foreach_mul_(trainer.buffers.params, torch.inf)
    try:
        generate_tokens(generator(trainer), [1], SampleConfig())
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


def chat(
    rank: int, world_size: int, config: ChatConfig, lines: list[str], ends: Collection[int] = ()
) -> tuple[str, list[int]]:
    """(what rank 0 shows, tokens that went through the model in every turn). Lines are typed at once. ends: tokens of
    the tokenizer that end an answer"""
    reading, writing = os.pipe()
    os.write(writing, "\n".join(lines).encode())
    os.close(writing)
    set_typed(reading)
    shown, counts = io.StringIO(), []
    answer = megapar.generate.chat._answer

    def counted(writer: Any, text: Text, side: Any) -> None:
        before = writer.generator.prefilled
        answer(writer, text, side)
        counts.append(writer.generator.prefilled - before)
        new = len(text.tokens) - (text.ended != "stop")
        assert writer.generator.prefilled == new or text.start, "every token once"

    with (
        mock.patch("megapar.generate.chat._answer", counted),
        mock.patch("megapar.data.tokenizer.contract.Tokenizer.answer_ends", frozenset(ends)),
        mock.patch("megapar.generate.chat.console", lambda: shown),
    ):
        megapar.generate.chat.run_rank(config, rank, world_size)
    return shown.getvalue(), counts
