#!/usr/bin/env python3
"""Lines whose words are to be reversed: what a small model is fine-tuned on, made here from a seed.

python experiments/finetune/data.py FOLDER    writes train.jsonl and valid.jsonl there, as `data.source=finetune` reads,
                                              and the same as conversations: train-chat.jsonl and valid-chat.jsonl
"""

import json
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megapar.config.errors import ConfigError
from megapar.config.schema import DataConfig
from megapar.data.prepare import cache_folder, made_once
from megapar.data.records import prepare_records
from megapar.data.source import Prepared, Source
from megapar.data.sources.instructions import KIND, Instructions

# Words that the plays of lm_text use often.
_WORDS = """
the and to of you my is not me it in that he your for be his but with as this have thou so will what her thy do
no by shall if are we our thee all good lord now love on she at well they come would more was from then how let man here
there him who know go say may us when were must like make why such see which should tell did any too out"""
WORDS = _WORDS.split()
COUNT, VALID, SEED = 20_000, 500, 1
PATH = "words"  # as `data.path`


def lines() -> list[dict[str, str]]:
    """Prompts with their responses, no prompt twice: three to five words, and the same from the last to the first."""
    draw = random.Random(SEED)
    found: dict[str, str] = {}
    while len(found) < COUNT + VALID:
        words = [draw.choice(WORDS) for _ in range(draw.randint(3, 5))]
        found[" ".join(words)] = " ".join(reversed(words))
    return [{"prompt": f"REVERSE: {words}\nANSWER:", "response": f" {answer}"} for words, answer in found.items()]


def conversation(line: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    """The same as messages."""
    asked = line["prompt"].splitlines()[0]
    said = [{"role": "user", "content": asked}, {"role": "assistant", "content": line["response"].strip()}]
    return {"messages": said}


def write(folder: Path) -> None:
    """Write all files into a folder that is made for them."""
    folder.mkdir(parents=True, exist_ok=True)
    made = lines()
    for name, part in (("valid", made[:VALID]), ("train", made[VALID:])):
        for kind, shown in (("", part), ("-chat", map(conversation, part))):
            text = "".join(f"{json.dumps(line)}\n" for line in shown)
            (folder / f"{name}{kind}.jsonl").write_text(text, encoding="utf-8")


def prepare(config: DataConfig, say: Callable[[str], None]) -> Prepared:
    """The files in the cache, then as `instructions` has it. Raises UserError."""
    if config.path != PATH:
        raise ConfigError("data.path", config.path, f"finetune makes its own lines; use {PATH}")
    folder = made_once(cache_folder(config) / f"finetune-reverse-{COUNT}-{VALID}-{SEED}", write)
    files = {"path": str(folder / "train.jsonl"), "valid": str(folder / "valid.jsonl")}
    return prepare_records(KIND, replace(config, **files), say)  # type: ignore[arg-type]


SOURCE = Source("finetune", "lines whose words are to be reversed", prepare, Instructions)

if __name__ == "__main__":
    write(Path(sys.argv[1]))
