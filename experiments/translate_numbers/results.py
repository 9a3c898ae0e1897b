#!/usr/bin/env python3
"""The README's table: how often a run spells a number that it has not seen, word for word.

python experiments/translate_numbers/results.py RUN... [--readme FILE]    RUN: with the match.json of `megapar eval`
"""

import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]

from experiments.runs import Run, agreements, commands, exact_match, share_of, write_table  # noqa: E402
from experiments.translate_numbers import baselines, data  # noqa: E402
from megapar.config.errors import UserError  # noqa: E402
from megapar.config.model import Part, model_weights  # noqa: E402
from megapar.config.stages import stage_parts  # noqa: E402

README = Path(__file__).with_name("README.md")
LOSS = "val_loss"


def main(arguments: list[str]) -> int:
    return write_table(arguments, README, figures)


def figures(runs: list[Run]) -> str:
    """Markdown: the table, agreements of layouts, and what reproduces it. Raises UserError."""
    kinds: dict[tuple[str, int], list[Run]] = defaultdict(list)
    for run in runs:
        if run.config.task.name != "seq2seq":
            raise UserError(f"{run.folder}: no run of an encoder and a decoder; give those")
        kinds[run.layout, run.config.train.steps].append(run)
    lines = [
        "| exact match, held out | what | layout | stages | seeds | held-out loss | steps | minutes | commit |",
        "|---" * 9 + "|",
        *(row(found) for found in kinds.values()),
        f"| {baselines.two_known_numbers(*data.lines()):.1%} | two known numbers beside each other | | | | | | | |",
    ]
    return "\n".join([*lines, "", *agreements(runs, LOSS, "held-out losses"), *commands(runs)])


def row(runs: list[Run]) -> str:
    config = runs[0].config
    cells = (
        share_of([exact_match(run) for run in runs]),
        f"**encoder and decoder, {model_weights(config) / 1e6:.2f} M weights**",
        runs[0].layout,
        " \\| ".join(stage_of(stage) for stage in stage_parts(config)),
        ", ".join(str(run.config.train.seed) for run in runs),
        f"{mean(run.last(LOSS) for run in runs):.4f}",
        str(config.train.steps),
        f"{mean(run.minutes for run in runs):.1f}",
        ", ".join(sorted({run.commit for run in runs})),
    )
    return f"| {' | '.join(cells)} |"


def stage_of(stage: list[Part]) -> str:
    """The layers of a stage: E of an encoder, D of a decoder."""
    counts = {"E": sum(part.stack == "encoder" for part in stage if part.kind == "layer")}
    counts["D"] = sum(part.kind == "layer" for part in stage) - counts["E"]
    return " ".join(f"{count}{name}" for name, count in counts.items() if count)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
