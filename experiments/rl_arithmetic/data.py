#!/usr/bin/env python3
"""Sums of two numbers, made here from a seed: with their answers for a warm-up, and as prompts for a policy.

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
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]  # for `task.reward`, too

from megapar.config.errors import ConfigError  # noqa: E402
from megapar.config.schema import DataConfig, TrainConfig  # noqa: E402
from megapar.data.prepare import cache_folder, made_once  # noqa: E402
from megapar.data.records import prepare_records  # noqa: E402
from megapar.data.source import Prepared, Samples, Source, Split  # noqa: E402
from megapar.data.sources import instructions, prompts  # noqa: E402

NUMBERS, HELD_OUT, SEED = 100, 500, 1  # 00 to 99
SOURCES = {"examples": instructions, "prompts": prompts}  # as `data.path`


def lines() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(to learn from, held out): no two operands are in both, in either order. The sum has three digits, the units
    first, as one adds on paper (Lee et al. 2023, "Teaching arithmetic to small transformers")."""
    pairs = [(one, other) for one in range(NUMBERS) for other in range(one, NUMBERS)]
    random.Random(SEED).shuffle(pairs)
    train: list[dict[str, str]] = []
    valid: list[dict[str, str]] = []
    for pair in pairs:
        part = valid if len(valid) < HELD_OUT else train
        for one, other in {pair, pair[::-1]}:
            total = f"{one + other:03}"[::-1]
            part.append({"prompt": f"{one:02}+{other:02}=", "response": total, "group": f"{pair[0]}+{pair[1]}"})
    return train, valid


def write(folder: Path) -> None:
    """Write the files into a folder that is made for them. A policy is shown no response, only its reward is."""
    folder.mkdir(parents=True, exist_ok=True)
    train, valid = lines()
    for name, part in (("examples", train), ("prompts", train), ("valid", valid)):
        text = "".join(f"{json.dumps(line)}\n" for line in part)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def prepare(config: DataConfig, say: Callable[[str], None]) -> Prepared:
    """The files in the cache, then as `instructions` or `prompts` has it. Raises UserError."""
    if config.path not in SOURCES:
        problem = f"rl_arithmetic makes its own lines; use {' or '.join(SOURCES)}"
        raise ConfigError("data.path", config.path, problem)
    folder = made_once(cache_folder(config) / f"rl_arithmetic-{NUMBERS}-{HELD_OUT}-{SEED}", write)
    files = {"path": str(folder / f"{config.path}.jsonl"), "valid": str(folder / "valid.jsonl")}
    return prepare_records(SOURCES[config.path].KIND, replace(config, **files), say)  # type: ignore[arg-type]


def open_samples(config: TrainConfig, split: Split) -> Samples:
    return SOURCES[config.data.path].SOURCE.open(config, split)


SOURCE = Source("rl_arithmetic", "sums of two numbers, with answers or without", prepare, open_samples)

if __name__ == "__main__":
    write(Path(sys.argv[1]))
