#!/usr/bin/env python3
"""Numbers in words, from one language into another: what an encoder and a decoder learn, made here by num2words.

python experiments/translate_numbers/data.py FOLDER    writes train.jsonl and valid.jsonl there, as
                                                       `data.source=translate_numbers` reads
"""

import importlib.util
import json
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from pathlib import Path

from megapar.config.errors import ConfigError, UserError
from megapar.config.schema import DataConfig
from megapar.data.prepare import cache_folder, made_once
from megapar.data.records import prepare_records
from megapar.data.source import Prepared, Source
from megapar.data.sources.paired import KIND, Paired

LANGUAGES = ("en", "de", "fr", "es")
NUMBERS, HELD_OUT, SEED = 10_000, 500, 1  # 0 to 9,999
PATH = "numbers"  # as `data.path`


def words(number: int) -> dict[str, str]:
    """A number in every language. Raises ConfigError where num2words is not installed."""
    if importlib.util.find_spec("num2words") is None:
        problem = "writes numbers by the package num2words, which is not installed; pip install 'megapar[experiments]'"
        raise ConfigError("data.source", "translate_numbers", problem)
    from num2words import num2words

    return {language: num2words(number, lang=language) for language in LANGUAGES}


def lines() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(to learn from, held out): no number is in both, in any language. Of a held-out number one pair of languages."""
    draw = random.Random(SEED)
    numbers = list(range(NUMBERS))
    draw.shuffle(numbers)
    pairs = list(permutations(LANGUAGES, 2))
    train: list[dict[str, str]] = []
    valid: list[dict[str, str]] = []
    for place, number in enumerate(numbers):
        spelled = words(number)
        for one, other in [pairs[place % len(pairs)]] if place < HELD_OUT else pairs:
            line = {"source": f"{other}: {spelled[one]}", "target": spelled[other], "group": str(number)}
            (valid if place < HELD_OUT else train).append(line)
    return train, valid


def write(folder: Path) -> None:
    """Write both files into a folder that is made for them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, made in zip(("train", "valid"), lines(), strict=True):
        text = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in made)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def prepare(config: DataConfig, say: Callable[[str], None]) -> Prepared:
    """The files in the cache, then as `paired` has it. Raises UserError."""
    if config.path != PATH:
        raise ConfigError("data.path", config.path, f"translate_numbers makes its own lines; use {PATH}")
    words(0)
    folder = made_once(cache_folder(config) / f"translate_numbers-{NUMBERS}-{HELD_OUT}-{SEED}", write)
    files = {"path": str(folder / "train.jsonl"), "valid": str(folder / "valid.jsonl")}
    return prepare_records(KIND, replace(config, **files), say)  # type: ignore[arg-type]


SOURCE = Source("translate_numbers", "numbers in words of one language and another", prepare, Paired)

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("give a folder: python experiments/translate_numbers/data.py FOLDER")
    try:
        write(Path(sys.argv[1]))
    except (UserError, OSError) as error:
        sys.exit(f"{sys.argv[1]}: {error}")
