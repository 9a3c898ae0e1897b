"""Targets written with what an encoder has read in a cache are those of a model that computes all anew."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megapar.config.errors import UserError
from megapar.config.run_schema import SampleConfig
from megapar.config.schema import TrainConfig
from megapar.generate.choose import choose
from megapar.generate.tokens import Generator
from megapar.launch.pool import WorkerPool
from megapar.train.hooks.sample import Sample
from megapar.train.trainer import Trainer
from tests.encoder_decoder.pairs import FAMILIES
from tests.tiny import tiny_config

WIDE: dict[str, Any] = {"model.init_std": 0.5}  # logits that are far apart
PROMPTS = [[5, 60, 17], [9], list(range(20, 37)), [1, 2, 3, 4, 5, 6, 7], [40, 41]]
SAMPLES = [
    SampleConfig(max_tokens=11, temperature=0.0),
    SampleConfig(max_tokens=8, temperature=1.0, seed=1),
    SampleConfig(max_tokens=6, temperature=1.5, top_k=20, top_p=0.9, seed=2),
    SampleConfig(max_tokens=1, temperature=0.0),
    SampleConfig(max_tokens=9, temperature=0.7, seed=3),
]
END = 2


def generator(trainer: Trainer, texts: int) -> Generator:
    config = trainer.config
    return Generator.of(config, trainer.stages, trainer.context, end_of_text=END, texts=texts)


def written(rank: int, world_size: int, config: TrainConfig) -> list[tuple[list[int], list[float]]]:
    """Three at a time, so that texts join and leave."""
    trainer = Trainer(config, rank)
    made = generator(trainer, 3)
    texts = [made.text(prompt, sample) for prompt, sample in zip(PROMPTS, SAMPLES, strict=True)]
    assert {id(text) for text in made.write(texts)} == {id(text) for text in texts}
    trainer.close()
    return [(text.written, text.logprobs) for text in texts]


def anew(rank: int, world_size: int, config: TrainConfig) -> list[tuple[list[int], list[float]]]:
    """All of a source and of what is written, for every token."""
    trainer, found = Trainer(config, rank), []
    [stage] = trainer.stages.values()
    stage.train(False)
    for prompt, sample in zip(PROMPTS, SAMPLES, strict=True):
        tokens = [config.model.encoder.start]
        logprobs: list[float] = []
        while len(logprobs) < sample.max_tokens:
            batch = {"source": torch.tensor([[*prompt, END]]), "ids": torch.tensor([tokens])}
            with torch.no_grad():
                [*_, logits] = stage({}, batch | {"samples": torch.zeros(1).long(), "step": torch.tensor(0)})["logits"]
            token = int(choose(logits.numpy(), sample, len(tokens))) if sample.temperature else int(logits.argmax())
            logprobs.append(float(torch.log_softmax(logits, 0)[token]))
            if token == END:
                break
            tokens.append(token)
        found.append((tokens[1:], logprobs))
    trainer.close()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_changes_no_target(family: str, pool: WorkerPool, pairs: dict[str, Any]) -> None:
    """In any layout, whatever is written beside it. Probabilities are sums in other orders: 1e-9, where their
    logarithms reach 1e-12."""
    values = pairs | FAMILIES[family] | WIDE
    [expected] = pool.run(anew, 1, tiny_config(pairs["data.prefix"], **values))
    assert sum(len(set(text)) > 2 for text, _ in expected) > 1
    more: dict[str, Any] = {"parallel.sequence_parallel": True}
    for layout, own in (("single", {}), ("tp2", {}), ("pp2", {}), ("pp4", {}), ("tp2pp2", more)):
        config = tiny_config(pairs["data.prefix"], layout, **values | own)
        for found in pool.run(written, config.parallel.layout.world, config):
            assert [text for text, _ in found] == [text for text, _ in expected], layout
            for (_, mine), (_, theirs) in zip(found, expected, strict=True):
                np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-9)


def test_an_encoder_reads_once(pairs: dict[str, Any]) -> None:
    """Counted: the tokens that its first layer sees."""
    trainer = Trainer(tiny_config(pairs["data.prefix"], **pairs | FAMILIES["t5"] | WIDE), 0)
    seen: list[int] = []
    stage: Any = trainer.stages[0]
    stage.encoder.layers["0"].register_forward_hook(lambda layer, args, out: seen.append(len(args[0])))
    made = generator(trainer, 2)
    list(made.write([made.text(prompt, SampleConfig(max_tokens=4, seed=5)) for prompt in PROMPTS]))
    assert sum(seen) == sum(len(prompt) + 1 for prompt in PROMPTS) and 0 not in seen
    with pytest.raises(
        UserError, match=r"19 tokens with the end of text, and the encoder reads train.source_length=18"
    ):
        made.text(list(range(18)), SampleConfig())
    trainer.close()


def test_a_run_shows_what_it_writes(pairs: dict[str, Any]) -> None:
    """Behind the last step: the target alone, or why there is none."""
    values = pairs | {"task.sample_tokens": 4}
    for prompt, problem in (("12 the of", None), ("the of a " * 9, "the encoder reads train.source_length=18")):
        config = tiny_config(pairs["data.prefix"], **values | {"task.sample_prompt": prompt})
        trainer = Trainer(config, 0)
        loop: Any = SimpleNamespace(config=config, trainer=trainer)
        found = Sample(loop).finish()
        assert (problem or "") in (found["sample_problem"] or "")
        assert found["sample"] is None if problem else "the of" not in found["sample"]
        trainer.close()
