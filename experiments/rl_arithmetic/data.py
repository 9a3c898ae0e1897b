#!/usr/bin/env python3
"""Sums of two numbers, made here from a seed: with a teacher's answers, and as prompts for a policy.

python experiments/rl_arithmetic/data.py FOLDER    writes examples.jsonl, prompts.jsonl and valid.jsonl there, as
                                                   `data.source=rl_arithmetic` reads
"""

import json
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]  # for `reward`, too

from megapar.config.errors import ConfigError  # noqa: E402
from megapar.config.schema import DataConfig, TrainConfig  # noqa: E402
from megapar.data.prepare import cache_folder, made_once  # noqa: E402
from megapar.data.records import prepare_records  # noqa: E402
from megapar.data.source import Prepared, Samples, Source, Split  # noqa: E402
from megapar.data.sources import instructions, prompts  # noqa: E402

HELD_OUT, SEED = 500, 1
CARELESS, RIGHT = 2, 1  # answers of the teacher to each sum
SOURCES = {"examples": instructions, "prompts": prompts}  # as `data.path`
Line = dict[str, str]


def sums() -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(to learn from, held out): pairs of 0 to 99 whose units carry. No two numbers are in both, in either order."""
    pairs = [(one, other) for one in range(100) for other in range(one, 100) if one % 10 + other % 10 > 9]
    random.Random(SEED).shuffle(pairs)
    split = (
        [pair for one in part for pair in sorted({one, one[::-1]})] for part in (pairs[HELD_OUT:], pairs[:HELD_OUT])
    )
    train, valid = split
    return train, valid


def right(one: int, other: int) -> str:
    """The sum, units first, as one adds on paper (Lee et al. 2023, "Teaching arithmetic to small transformers")."""
    return f"{one + other:03}"[::-1]


def careless(one: int, other: int) -> str:
    """The sum by one who forgets to carry: never right here."""
    return f"{(one % 10 + other % 10) % 10}{(one // 10 + other // 10) % 10}0"


def line(one: int, other: int, response: str) -> Line:
    first, last = sorted((one, other))
    return {"prompt": f"{one:02}+{other:02}=", "response": response, "group": f"{first}+{last}"}


def files() -> dict[str, list[Line]]:
    """examples: the teacher's; prompts: the same sums, with the right response for the reward alone; valid: others."""
    train, valid = sums()
    answers = [careless] * CARELESS + [right] * RIGHT
    found = {"examples": [line(*pair, answer(*pair)) for pair in train for answer in answers]}
    return found | {"prompts": [line(*p, right(*p)) for p in train], "valid": [line(*p, right(*p)) for p in valid]}


def write(folder: Path) -> None:
    """Write the files into a folder that is made for them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in files().items():
        text = "".join(f"{json.dumps(one)}\n" for one in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def prepare(config: DataConfig, say: Callable[[str], None]) -> Prepared:
    """The files in the cache, then as `instructions` or `prompts` has it. Raises UserError."""
    if config.path not in SOURCES:
        problem = f"rl_arithmetic makes its own lines; use {' or '.join(SOURCES)}"
        raise ConfigError("data.path", config.path, problem)
    name = f"rl_arithmetic-{HELD_OUT}-{SEED}-{CARELESS}-{RIGHT}"
    folder = made_once(cache_folder(config) / name, write)
    paths = {"path": str(folder / f"{config.path}.jsonl"), "valid": str(folder / "valid.jsonl")}
    return prepare_records(SOURCES[config.path].KIND, replace(config, **paths), say)  # type: ignore[arg-type]


def open_samples(config: TrainConfig, split: Split) -> Samples:
    return SOURCES[config.data.path].SOURCE.open(config, split)


SOURCE = Source("rl_arithmetic", "sums of two numbers, with answers or without", prepare, open_samples)

if __name__ == "__main__":
    write(Path(sys.argv[1]))
