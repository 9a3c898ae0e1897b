#!/usr/bin/env python3
"""The README's table: how often fine-tuned runs answer a held-out line word for word, and how far layouts are apart.

python experiments/finetune/results.py RUN... [--readme FILE]    RUN: with the match.json of `megapar eval` in it
"""

import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]

from experiments.runs import Run, agreements, commands, exact_match, share_of, write_table  # noqa: E402
from megapar.config.errors import UserError  # noqa: E402
from megapar.config.model import model_weights, parts  # noqa: E402

README = Path(__file__).with_name("README.md")
LOSS = "val_loss"


def main(arguments: list[str]) -> int:
    return write_table(arguments, README, figures)


def figures(runs: list[Run]) -> str:
    """Markdown: the table, agreements of layouts, and what reproduces it. Raises UserError."""
    kinds: dict[tuple[object, ...], list[tuple[Run, float]]] = defaultdict(list)
    for run in runs:
        if run.config.task.name != "sft":
            raise UserError(f"{run.folder}: no run that fine-tunes; give those")
        kinds[run.config.model.lora.rank, run.layout, run.config.train.steps].append((run, exact_match(run)))
    lines = [
        "| exact match, held out | trained | layout | seeds | held-out loss | steps | minutes of steps | commit |",
        "|---" * 8 + "|",
        *(row(found) for _, found in sorted(kinds.items(), key=lambda one: one[0])),
    ]
    return "\n".join([*lines, "", *agreements(runs, LOSS, "held-out losses"), *commands(runs)])


def row(found: list[tuple[Run, float]]) -> str:
    runs, matches = [run for run, _ in found], [match for _, match in found]
    config = runs[0].config
    adapters = sum(part.adapters for part in parts(config))
    rank, weights = config.model.lora.rank, model_weights(config)
    trained = f"LoRA of rank {rank}, {adapters / 1e6:.2f} M weights" if rank else f"all {weights / 1e6:.2f} M weights"
    cells = (
        share_of(matches),
        f"**{trained}**",
        runs[0].layout,
        ", ".join(str(run.config.train.seed) for run in runs),
        f"{mean(run.last(LOSS) for run in runs):.4f}",
        str(config.train.steps),
        f"{mean(run.minutes for run in runs):.1f}",
        ", ".join(sorted({run.commit for run in runs})),
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
