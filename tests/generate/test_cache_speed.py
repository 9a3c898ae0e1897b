"""What the cache saves, by the wall clock."""

from statistics import median
from time import perf_counter
from typing import Any

import pytest
import torch

from megapar.config.run_schema import SampleConfig
from megapar.generate.tokens import Text
from megapar.train.trainer import Trainer
from tests.generate.jobs import generator
from tests.tiny import tiny_config

DEMO: dict[str, Any] = {
    "model.layers": 4,
    "model.hidden": 128,
    "model.heads": 4,
    "model.kv_heads": 2,
    "model.ffn": 384,
    "train.seq_length": 512,
    "train.dtype": "fp32",
}
PROMPT, TOKENS = 480, 30


@pytest.mark.slow
def test_a_token_behind_a_long_text_takes_a_twentieth_of_computing_its_context(tokens: str) -> None:
    """At 480 to 512 tokens of the demo's model: median of seven pairs, one after the other on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    config = tiny_config(tokens, **DEMO)
    trainer = Trainer(config, 0)
    assert config.model.vocab_size is not None
    prompt = torch.randint(config.model.vocab_size, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
    text = Text(prompt, SampleConfig(max_tokens=8 * TOKENS, temperature=0.0))
    writer = generator(trainer)
    [stage] = trainer.stages.values()
    ids = torch.tensor([prompt + [0] * (config.train.seq_length - PROMPT)])
    batch = {"ids": ids, "samples": torch.zeros(1, dtype=torch.int64), "step": torch.tensor(0)}
    ratios = []
    for _ in range(7):
        text.goes_on(prompt, text.sample)
        writer.step([text])  # the prompt itself
        begin = perf_counter()
        for _ in range(TOKENS):
            writer.step([text])
        cached = (perf_counter() - begin) / TOKENS
        stage.train(False)
        begin = perf_counter()
        with torch.no_grad():
            stage({}, batch)
        ratios.append((perf_counter() - begin) / cached)
    trainer.close()
    torch.set_num_threads(threads)
    assert median(ratios) >= 20, ratios
