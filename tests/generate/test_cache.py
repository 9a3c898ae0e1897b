"""Texts written with cached keys and values are those of a model that computes the whole context for every token."""

from typing import Any

import numpy as np
import pytest
import torch

from megapar.config.errors import UserError
from megapar.config.run_schema import SampleConfig
from megapar.config.schema import TrainConfig
from megapar.generate.tokens import Generator, Text, window_start
from megapar.launch.pool import WorkerPool
from megapar.train.trainer import Trainer
from tests.generate import jobs
from tests.tiny import GPT2, tiny_config

WIDE: dict[str, Any] = {"model.init_std": 0.5, "train.seq_length": 12}  # logits that are far apart
SEQUENCE_PARALLEL = {"parallel.sequence_parallel": True}
GEMMA: dict[str, Any] = {
    "model.layers": 4,
    "model.window": 3,
    "model.window_pattern": "WFW",
    "model.window_rope_theta": 500.0,
    "model.rope_scaling.kind": "dynamic",
    "model.rope_scaling.factor": 2.0,
    "model.rope_scaling.original_length": 6,
    "model.qk_norm": "head",
    "model.norm_order": "sandwich",
    "model.norm_offset": True,
    "model.attention_scale": 0.3,
    "model.attention_softcap": 2.0,
    "model.logit_softcap": 5.0,
    "model.embedding_scale": 2.0,
    "model.activation": "geglu",
    "model.tied": True,
}
OLMO: dict[str, Any] = {"model.qk_norm": "all", "model.norm_order": "output", "model.kv_heads": 1}  # copies under tp
PROMPTS = [[5, 60, 17], [9], list(range(20, 31)), [1, 2, 3, 4, 5, 6, 7], list(range(30))]
SAMPLES = [
    SampleConfig(max_tokens=14, temperature=0.0),
    SampleConfig(max_tokens=10, temperature=1.0, seed=1),
    SampleConfig(max_tokens=6, temperature=1.5, top_k=20, top_p=0.9, seed=2),
    SampleConfig(max_tokens=1, temperature=0.0),
    SampleConfig(max_tokens=9, temperature=0.7, seed=3),
]


@pytest.mark.parametrize(
    ("layouts", "both"),
    [
        ([("single", {}), ("tp2", {}), ("pp2", {}), ("tp2pp2", SEQUENCE_PARALLEL)], {}),
        ([("single", {}), ("tp4", SEQUENCE_PARALLEL), ("dp2", {"parallel.zero": 1})], GPT2),
        ([("single", {}), ("tp2pp2", {})], GEMMA),
        ([("tp4", {}), ("pp2", {"pipeline.schedule": "zbv", "model.layers": 4})], OLMO),
    ],
    ids=["llama", "gpt2", "gemma", "olmo"],
)
def test_the_cache_changes_no_text(
    pool: WorkerPool, tokens: str, layouts: list[tuple[str, dict[str, Any]]], both: dict[str, Any]
) -> None:
    """In any layout, whatever is written beside it: three at a time, so that texts join and leave. Probabilities are
    sums in other orders: 1e-9, where their logarithms reach 1e-12."""
    both = both | WIDE
    for layout, values in layouts:
        config = tiny_config(tokens, layout, **both | values)
        alone = tiny_config(tokens, **both | {"model.layers": config.model.layers})
        expected = pool.run(jobs.recomputed, 1, alone, PROMPTS, SAMPLES)[0]
        assert all(len(set(text)) > 2 for text, _ in expected[:3])
        for found in pool.run(jobs.continuations, config.parallel.layout.world, config, PROMPTS, SAMPLES, 3):
            assert [text for text, _ in found] == [text for text, _ in expected], layout
            for (_, mine), (_, theirs) in zip(found, expected, strict=True):
                np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-9)


def test_company_changes_nothing(tokens: str) -> None:
    """A text alone and beside others, to 1e-12: products of more rows may round in another way."""
    trainer = Trainer(tiny_config(tokens, **WIDE), 0)
    together = [Text(prompt, sample) for prompt, sample in zip(PROMPTS, SAMPLES, strict=True)]
    list(jobs.generator(trainer, 5).write(together))
    for text, prompt, sample in zip(together, PROMPTS, SAMPLES, strict=True):
        [alone] = jobs.generator(trainer).write([Text(prompt, sample)])
        assert alone.written == text.written
        np.testing.assert_allclose(alone.logprobs, text.logprobs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_other_precisions(tokens: str, dtype: str) -> None:
    config = tiny_config(tokens, **WIDE | {"train.dtype": dtype})
    bound = {"fp32": 1e-4, "bf16": 0.3}[dtype]  # rounding, to 24 and to 8 bits, of logits of about 10
    trainer = Trainer(config, 0)
    [text] = jobs.generator(trainer).write([Text([5, 60, 17], SampleConfig(max_tokens=9, temperature=0.0))])
    [stage] = trainer.stages.values()
    ids = torch.tensor([text.tokens])
    with torch.no_grad():
        batch = {"ids": ids, "samples": torch.zeros(1, dtype=torch.int64), "step": torch.tensor(0)}
        logits = torch.log_softmax(stage({}, batch)["logits"].float(), 1)
    expected = logits[torch.arange(2, 11), text.tokens[3:]]
    np.testing.assert_allclose(text.logprobs, expected, rtol=0, atol=bound)


def test_a_token_goes_through_the_model_once(tokens: str) -> None:
    trainer = Trainer(tiny_config(tokens, **WIDE), 0)
    generator = jobs.generator(trainer)
    text = Text([1, 2, 3], SampleConfig(max_tokens=5))
    list(generator.write([text]))
    assert generator.prefilled == 3 + 4  # the last one written is not read
    generator.prefilled = 0
    list(generator.write([Text(list(range(12)), SampleConfig(max_tokens=4))]))
    assert generator.prefilled == 12 + 10 + 2  # the full context, then what is left of it, 13 - 3


def test_a_text_that_goes_on_keeps_its_beginning(tokens: str) -> None:
    trainer = Trainer(tiny_config(tokens, **WIDE), 0)
    generator, greedy = jobs.generator(trainer), SampleConfig(max_tokens=3, temperature=0.0)

    def write(text: Text) -> list[int]:
        generator.prefilled = 0
        while not text.ended:
            generator.step([text])
        return text.written

    text = Text([1, 2, 3], greedy)
    first = write(text)
    # More; another end; the same again; another beginning. Each time two of three new tokens are read, too.
    for prompt, read in (([1, 2, 3, *first, 7], 2), ([1, 2, 9, 9], 2), ([1, 2, 9, 9], 1), ([4, 2, 9], 3)):
        text.goes_on(prompt, greedy)
        found = write(text)
        assert generator.prefilled == read + 2
        [expected] = jobs.generator(trainer).write([Text(prompt, greedy)])
        assert found == expected.written


def test_a_text_that_comes_back_is_read_again(tokens: str) -> None:
    """Its slot was another's meanwhile."""
    trainer = Trainer(tiny_config(tokens, **WIDE), 0)
    generator, greedy = jobs.generator(trainer), SampleConfig(max_tokens=3, temperature=0.0)
    text = Text([1, 2, 3], greedy)
    list(generator.write([text]))
    list(generator.write([Text([30, 31, 32, 33, 34], greedy)]))
    prompt = [*text.tokens, 7]
    text.goes_on(prompt, greedy)
    list(generator.write([text]))
    [expected] = jobs.generator(trainer).write([Text(prompt, greedy)])
    assert text.written == expected.written


def test_window_start() -> None:
    for context in (1, 2, 3, 4, 7, 12, 64):
        for length in range(1, 5 * context):
            seen = length - window_start(length, context)
            assert seen == len(jobs.in_context(range(length), context))
            assert length <= context or 3 * context / 4 - 1 < seen <= context


def test_a_stage_without_a_cache_is_refused(tokens: str) -> None:
    class Plain(torch.nn.Module):
        def forward(self, received: Any, batch: Any) -> Any:
            return received

    trainer = Trainer(tiny_config(tokens), 0)
    stages: Any = {0: Plain()}
    with pytest.raises(UserError, match=r"model\.module: the stage Plain can't write: its forward takes no cache"):
        Generator(stages, trainer.context, context_length=8)


def test_what_is_not_finite_stays_with_its_text(tokens: str) -> None:
    """A text whose logits are not finite ends, those beside it don't, and its slot is clean for the next."""
    config: TrainConfig = tiny_config(tokens, **WIDE)
    trainer = Trainer(config, 0)
    [stage] = trainer.stages.values()
    embedding = stage.embedding.tokens.owner.tensor  # type: ignore[attr-defined]
    embedding.data[50] = torch.nan
    greedy = SampleConfig(max_tokens=3, temperature=0.0)
    texts = [Text(prompt, greedy) for prompt in ([1, 2], [1, 50, 2], [3], [2, 4, 5])]
    list(jobs.generator(trainer, 2, vocab_size=50).write(texts))
    assert [text.ended for text in texts] == ["length", "broken", "length", "length"]
    for text in (texts[0], texts[2], texts[3]):
        [alone] = jobs.generator(trainer, vocab_size=50).write([Text(text.tokens[: text.prompt], greedy)])
        assert alone.written == text.written
