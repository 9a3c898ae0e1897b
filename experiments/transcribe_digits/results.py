#!/usr/bin/env python3
"""The README's table: how often a run writes a string of digits as it was said.

python experiments/transcribe_digits/results.py RUN... [--readme FILE]    RUN: with the media.json of `megapar eval`
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]

from experiments.answers import Item, readme, table  # noqa: E402
from experiments.runs import Run, write_table  # noqa: E402

README = readme(__file__)
COLUMNS = ("4 words, a length not in training", "1, 2, 3 or 5 words")


def main(arguments: list[str]) -> int:
    return write_table(arguments, README, figures)


def figures(runs: list[Run]) -> str:
    """Markdown, see `table`. Raises UserError."""
    return table(runs, kinds, COLUMNS)


def kinds(item: Item) -> list[str]:
    """By how many words were said."""
    return [COLUMNS[0] if len(item["right"].split()) == 4 else COLUMNS[1]]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
