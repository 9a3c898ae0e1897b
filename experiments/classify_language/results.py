#!/usr/bin/env python3
"""The README's table: the accuracy of runs on held-out messages, with pre-training and without, beside n-grams.

python experiments/classify_language/results.py RUN... [--readme FILE]    RUN: the folder of one that classifies
"""

import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]

from experiments.classify_language.baselines import accuracy, naive_bayes  # noqa: E402
from experiments.classify_language.data import translations  # noqa: E402
from experiments.runs import Run, commands, share_of, write_table  # noqa: E402
from megapar.config.errors import UserError  # noqa: E402
from megapar.config.model import model_weights  # noqa: E402

README = Path(__file__).with_name("README.md")
ACCURACY = "val_accuracy"
ORDERS = (1, 2, 3, 4)  # of n-grams, up to and with which they are counted


def main(arguments: list[str]) -> int:
    return write_table(arguments, README, figures)


def figures(runs: list[Run]) -> str:
    """Markdown: what is held out, the table, and what reproduces it. Raises UserError."""
    for run in runs:
        if run.config.task.name != "classify" or run.config.data.source != "classify_language":
            raise UserError(f"{run.folder}: no run of this experiment that classifies; give those")
    strings = translations()
    train, valid = ([one for one in strings if one.held_out == out] for out in (False, True))
    classes = {one.language for one in strings}
    messages = [len({one.message for one in part}) for part in (train, valid)]
    head = (
        f"{len(classes)} languages; {len(train):,} strings of {messages[0]} messages to learn from, {len(valid):,} of "
        f"{messages[1]} other messages held out. Guessing is right in {1 / len(classes):.1%}."
    )
    rows = [*baselines(train, valid), *map(row, by_kind(runs).values())]
    lines = ["| accuracy, held out | what | layout | seeds | steps | minutes of steps | commit |", "|---" * 7 + "|"]
    lines += [f"| {' | '.join(cells)} |" for _, *cells in sorted(rows, key=lambda cells: -float(cells[0]))]
    return "\n".join([head, "", *lines, "", *commands(runs)])


def baselines(train: list, valid: list) -> list[tuple[str, ...]]:
    texts, labels = [one.text for one in train], [one.language for one in train]
    found = []
    for order in ORDERS:
        answers = naive_bayes(texts, labels, [one.text for one in valid], longest=order)
        right = accuracy(answers, [one.language for one in valid])
        what = f"naive Bayes, n-grams of up to {order} character{'s' * (order > 1)}"
        found.append((str(right), f"{right:.1%}", what, *[""] * 5))
    return found


def by_kind(runs: list[Run]) -> dict[tuple[object, ...], list[Run]]:
    """Runs that differ in their seed alone."""
    kinds: dict[tuple[object, ...], list[Run]] = defaultdict(list)
    for run in runs:
        kinds[run.layout, run.config.checkpoint.weights is not None, run.config.train.steps].append(run)
    return kinds


def row(runs: list[Run]) -> tuple[str, ...]:
    found = [run.last(ACCURACY) for run in runs]
    first = runs[0]
    start = "pre-trained" if first.config.checkpoint.weights is not None else "from initial values"
    what = f"**this encoder, {model_weights(first.config) / 1e6:.2f} M weights, {start}**"
    seeds = ", ".join(str(run.config.train.seed) for run in runs)
    minutes = f"{mean(run.minutes for run in runs):.1f}"
    return (
        str(mean(found)),
        share_of(found),
        what,
        first.layout,
        seeds,
        str(first.config.train.steps),
        minutes,
        ", ".join(sorted({run.commit for run in runs})),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
