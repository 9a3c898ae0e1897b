"""Small JSONL files, and configs that learn from them."""

import json
import random
import string
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megapar.config.schema import DataConfig
from megapar.data.source import find_source
from megapar.data.tokenizer.train import train_bpe

WORDS = ["red", "blue", "green", "seven", "eight", "cat", "dog", "house", "tree"]
VOCABULARY = 300  # bytes, letters and a few pieces


def write(path: Path, lines: Iterable[Any]) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def words(seed: random.Random, count: int) -> str:
    return " ".join(seed.choice(WORDS) for _ in range(count))


def instructions(count: int = 40) -> list[dict[str, str]]:
    seed = random.Random(1)
    return [{"prompt": f"{words(seed, seed.randint(1, 3))}>", "response": words(seed, 1)} for _ in range(count)]


def preferences(count: int = 40) -> list[dict[str, str]]:
    seed = random.Random(2)
    lines = []
    for _ in range(count):
        chosen, rejected = seed.sample(WORDS, 2)
        lines.append({"prompt": f"{words(seed, seed.randint(1, 2))}>", "chosen": chosen, "rejected": rejected})
    return lines


def labelled(count: int = 40) -> list[dict[str, str]]:
    seed = random.Random(3)
    return [{"text": f"{words(seed, seed.randint(1, 2))} {name}", "label": name} for name in WORDS[:3] * (count // 3)]


def prompts(count: int = 40) -> list[dict[str, Any]]:
    seed = random.Random(4)
    return [{"prompt": f"{words(seed, seed.randint(1, 2))} {number}>", "best": number % 5} for number in range(count)]


LINES = {"instructions": instructions, "preferences": preferences, "labelled": labelled, "prompts": prompts}


def prepared(folder: Path, source: str, lines: Iterable[Any] | None = None, **data: Any) -> dict[str, Any]:
    """Keys of a config that reads these lines from a file in `folder`, prepared in a cache there."""
    path = write(folder / f"{source}.jsonl", LINES[source]() if lines is None else lines)
    if not (tokenizer := folder / "tokenizer.model").exists():
        train_bpe([f"{' '.join(WORDS)} {string.ascii_lowercase}{string.digits}>"] * 4, VOCABULARY, tokenizer)
    values: dict[str, Any] = {
        "path": str(path),
        "cache": str(folder / "cache"),
        "tokenizer": str(tokenizer),
        "split": 0.2,
    } | data
    found = find_source(source).prepare(DataConfig(source=source, **values), lambda line: None)
    keys = {f"data.{key}": value for key, value in values.items()}
    keys |= {"data.source": source, "data.prefix": found.prefix, "model.vocab_size": found.vocab_size}
    return keys | ({"model.output": "classes", "model.classes": found.classes} if found.classes else {})
