"""A model and a corpus so small that a training step takes milliseconds."""

from pathlib import Path
from typing import Any

import numpy as np

from megapar.config.check import check
from megapar.config.derive import resolve
from megapar.config.keys import changed
from megapar.config.layout import Layout
from megapar.config.schema import TrainConfig
from megapar.data.indexed import write_indexed

VOCABULARY = 61  # divisible by no number of ranks

LLAMA: dict[str, Any] = {"model.heads": 4, "model.kv_heads": 2}
GPT2: dict[str, Any] = {
    "model.heads": 4,
    "model.norm": "layernorm",
    "model.position": "learned",
    "model.activation": "gelu",
    "model.bias": True,
    "model.tied": True,
}


def write_tokens(folder: Path, seed: int = 0) -> str:
    """Token files of random documents; returns their PREFIX."""
    random = np.random.default_rng(seed)
    documents = [random.integers(0, VOCABULARY, size=random.integers(20, 60)) for _ in range(40)]
    write_indexed(folder / "tokens", [document.astype(np.uint16) for document in documents], np.uint16)
    return str(folder / "tokens")


def tiny_config(prefix: str, layout: str = "single", **values: Any) -> TrainConfig:
    """A resolved config: hidden 16, two layers, samples of 8 tokens, 4 steps of 8 samples; `values` by dotted key."""
    small: dict[str, Any] = {
        "model.hidden": 16,
        "model.layers": 2,
        "model.ffn": 32,
        "model.vocab_size": VOCABULARY,
        "data.path": prefix,
        "data.prefix": prefix,
        "optim.lr": 1e-2,
        "parallel.bucket_size": 1000,
        "parallel.check_gradients": True,
        "train.steps": 4,
        "train.seq_length": 8,
        "train.micro_batch_size": 2,
        "train.global_batch_size": 8,
        "train.dtype": "fp64",
    }
    ranks = Layout.parse(layout)
    axes = {f"parallel.{axis}": size for axis, size in ranks.items()}
    config = resolve(changed(TrainConfig(), small | LLAMA | axes | values))
    check(config)
    return config
