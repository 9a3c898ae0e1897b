"""Choosing tokens, against plain numpy, and text as it comes."""

from typing import Any

import numpy as np
import pytest
import torch

from megapar.config.run_schema import SampleConfig
from megapar.generate.choose import choose, uniform
from megapar.generate.text import TextStream
from megapar.generate.tokens import generate_tokens
from megapar.launch.pool import WorkerPool
from megapar.train.trainer import Trainer
from tests.generate import jobs
from tests.tiny import VOCABULARY, tiny_config


def reference(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """The probabilities that are drawn from, token by token as the definitions read."""
    p = np.exp(logits / temperature - np.max(logits / temperature))
    order = sorted(range(len(p)), key=lambda token: (-p[token], token))
    kept = order[:top_k] if top_k else order
    total = sum(p[token] for token in kept)
    nucleus: list[int] = []
    for token in kept:
        if nucleus and sum(p[other] for other in nucleus) / total >= top_p:
            break
        nucleus.append(token)
    out = np.zeros_like(p)
    out[nucleus] = p[nucleus] / p[nucleus].sum()
    return out


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.7), (5, 0.7), (1, 1.0), (0, 1e-9), (99, 0.99)])
def test_choice_is_the_inverse_of_the_reference(temperature: float, top_k: int, top_p: float) -> None:
    logits = np.random.default_rng(1).normal(size=40) * 2
    logits[7] = logits[3]  # equally likely: the smaller id comes first
    sample = SampleConfig(temperature=temperature, top_k=top_k, top_p=top_p, seed=3)
    probability = reference(logits, temperature, top_k, top_p)
    ends = np.cumsum(probability)
    for position in range(300):
        token = choose(logits, sample, position)
        assert probability[token] > 0
        assert ends[token] - probability[token] - 1e-12 <= uniform(3, position) <= ends[token] + 1e-12


def test_frequencies() -> None:
    """A chi-square test that a wrong distribution (another temperature) fails by far."""
    logits = np.random.default_rng(2).normal(size=8)
    draws = 4000
    for temperature, fits in ((1.0, True), (1.3, False)):
        sample = SampleConfig(temperature=temperature)
        counts = np.bincount([choose(logits, sample, position) for position in range(draws)], minlength=8)
        expected = reference(logits, 1.0, 0, 1.0) * draws
        assert (((counts - expected) ** 2 / expected).sum() < 24.3) == fits  # 99.9% for 7 degrees of freedom


def test_greedy() -> None:
    logits = np.array([0.0, 2.0, 2.0, 1.0])
    assert choose(logits, SampleConfig(temperature=0.0), 0) == 1
    assert choose(logits, SampleConfig(top_k=1), 0) == 1


def test_draws_differ_by_seed_and_position() -> None:
    values = {uniform(seed, position) for seed in (0, 1, 1 << 70) for position in range(10)}
    assert len(values) == 30
    assert uniform(1, 5) == uniform(1, 5)


WIDE: dict[str, Any] = {"model.init_std": 0.5}  # logits that are far apart


def test_context_moves_on_and_text_ends(tokens: str) -> None:
    trainer = Trainer(tiny_config(tokens, **WIDE), 0)
    greedy = SampleConfig(max_tokens=6, temperature=0.0)
    long = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    seen: list[int] = []

    def write(prompt: list[int], on_token: Any = lambda token: None, **options: Any) -> list[int]:
        return generate_tokens(jobs.generator(trainer, **options), prompt, greedy, on_token)

    whole = write(long, seen.append)
    assert whole == write(long[2:]) == seen  # of 10 tokens it sees 8, of 11 7
    assert whole != write(long[3:])
    assert write(long, end_of_text=whole[2]) == whole[: whole.index(whole[2])]
    assert generate_tokens(jobs.generator(trainer), long, greedy, ends={whole[2]}) == whole[: whole.index(whole[2])]
    assert max(write(long, vocab_size=5)) < 5
    assert max(whole) < VOCABULARY


def test_uses_the_logits_of_the_last_position(tokens: str) -> None:
    trainer = Trainer(tiny_config(tokens, **WIDE), 0)
    prompt = [5, 9, 2, 40]
    ids = torch.tensor([prompt])
    batch = {"ids": ids, "samples": torch.zeros(1, dtype=torch.int64), "step": torch.tensor(0)}
    trainer.stages[0].train(False)
    with torch.no_grad():
        logits = trainer.stages[0]({}, batch)["logits"]
    found = generate_tokens(jobs.generator(trainer), prompt, SampleConfig(max_tokens=1, temperature=0.0))
    assert found == [int(logits[3].argmax())]


def test_every_rank_refuses_broken_weights(pool: WorkerPool, tokens: str) -> None:
    lines = pool.run(jobs.broken_weights, 4, tiny_config(tokens, "tp2pp2"))
    assert len(set(lines)) == 1
    assert "logits for token 1 are not finite" in lines[0]


class Bytes:
    """A tokenizer whose tokens are bytes; known: and says so."""

    def __init__(self, known: bool) -> None:
        self.known = known

    def piece(self, token: int) -> bytes | None:
        return bytes([token]) if self.known else None

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(
    "data",
    [b"plain", "naïve 中文 🎉".encode(), b"\xff\xfe a \xe4", "half 中".encode()[:-1], b"", "\ufffd!".encode()],
)
def test_stream_writes_complete_characters(data: bytes, known: bool) -> None:
    pieces: list[str] = []
    stream = TextStream(Bytes(known), pieces.append)  # type: ignore[arg-type]
    for byte in data:
        stream.put(byte)
        assert not pieces or not pieces[-1].endswith("\ufffd")
    stream.finish()
    assert "".join(pieces) == data.decode("utf-8", errors="replace")
