"""Sources with targets of few words, and models that read and write them."""

import json
import random
from pathlib import Path
from typing import Any

from megapar.config.schema import DataConfig
from megapar.data.sources.paired import SOURCE

WORDS = ["the", "of", "a", "to", "in", "is", "you", "that", "it", "he", "was", "for", "on", "are"]
LENGTHS = {"train.source_length": 18, "train.seq_length": 12}

T5: dict[str, Any] = {
    "model.position": "relative",
    "model.relative_buckets": 8,
    "model.relative_distance": 9,
    "model.activation": "relu",
    "model.attention_scale": 1.0,
    "model.tied": True,
    "model.logit_scale": 0.3,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "t5": T5,
    "t5_gated": T5 | {"model.activation": "geglu", "model.tied": False, "model.logit_scale": 1.0},
    "modern": {"model.qk_norm": "head", "model.encoder.start": 3},
    "apart": {"model.encoder.shared": False, "model.tied": True, "model.norm_order": "sandwich"},
    "vaswani": {
        "model.norm": "layernorm",
        "model.norm_order": "post",
        "model.position": "learned",
        "model.activation": "gelu",
        "model.bias": True,
        "model.embedding_norm": True,
        "model.dropout": 0.1,
    },
}


def write_pairs(folder: Path, count: int = 80) -> Path:
    """A JSONL file of sources of one to four words, whose targets are their last ones in reverse."""
    chosen = random.Random(0)
    lines = []
    for number in range(count):
        words = [chosen.choice(WORDS) for _ in range(chosen.randint(1, 4))]
        lines.append(json.dumps({"source": f"{number} {' '.join(words)}", "target": " ".join(words[:-3:-1])}))
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def prepared(folder: Path) -> dict[str, Any]:
    """Keys of a run on them."""
    path = write_pairs(folder)
    data = DataConfig(path=str(path), vocab_size=300, cache=str(folder / "cache"), source="paired")
    found = SOURCE.prepare(data, lambda line: None)
    return {
        "data.source": "paired",
        "data.path": str(path),
        "data.prefix": found.prefix,
        "data.too_long": "truncate",
        "task.name": "seq2seq",
        "model.vocab_size": found.vocab_size,
        "model.encoder.layers": 2,
    } | LENGTHS
