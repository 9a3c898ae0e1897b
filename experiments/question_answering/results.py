#!/usr/bin/env python3
"""The README's table: how often a run answers a question as it should.

python experiments/question_answering/results.py RUN... [--readme FILE]    RUN: with the media.json of `megapar eval`
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]

from experiments.answers import Item, readme, table  # noqa: E402
from experiments.runs import Run, write_table  # noqa: E402

README = readme(__file__)
COLUMNS = ("about a picture", "about a passage")


def main(arguments: list[str]) -> int:
    return write_table(arguments, README, figures)


def figures(runs: list[Run]) -> str:
    """Markdown, see `table`. Raises UserError."""
    return table(runs, kinds, COLUMNS)


def kinds(item: Item) -> list[str]:
    """By what the question is about: a passage ends in a full stop before its question."""
    return [COLUMNS[1] if "." in item["text"] else COLUMNS[0]]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
