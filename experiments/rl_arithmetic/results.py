#!/usr/bin/env python3
"""The README's table: how often runs add two held-out numbers rightly, taught by a teacher and then by a reward.

python experiments/rl_arithmetic/results.py RUN... [--readme FILE]    RUN: with the match.json of `megapar eval` in it
"""

import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]

from experiments.runs import Run, commands, exact_match, share_of, write_table  # noqa: E402
from megapar.config.errors import UserError  # noqa: E402
from megapar.config.model import model_weights  # noqa: E402

README = Path(__file__).with_name("README.md")
TASKS = {"sft": "after the careless teacher", "policy": "after the reward"}
GAP = "logprob_gap"


def main(arguments: list[str]) -> int:
    return write_table(arguments, README, figures)


def figures(runs: list[Run]) -> str:
    """Markdown: the table, and what reproduces it. Raises UserError."""
    kinds: dict[tuple[int, str, int], list[Run]] = defaultdict(list)
    for run in runs:
        name = run.config.task.name
        if name not in TASKS or run.config.data.source != "rl_arithmetic":
            raise UserError(f"{run.folder}: no run of this experiment; give those")
        kinds[list(TASKS).index(name), run.layout, run.config.train.steps].append(run)
    lines = [
        "| exact match, held out | what | layout | seeds | largest gap, nats | steps | minutes of steps | commit |",
        "|---" * 8 + "|",
        *(row(found) for _, found in sorted(kinds.items(), key=lambda one: one[0])),
    ]
    return "\n".join([*lines, "", *commands(runs)])


def row(runs: list[Run]) -> str:
    config = runs[0].config
    gaps = [step[GAP] for run in runs for step in run.steps if GAP in step]
    cells = (
        share_of([exact_match(run) for run in runs]),
        f"**{TASKS[config.task.name]}**, {model_weights(config) / 1e6:.2f} M weights",
        runs[0].layout,
        ", ".join(str(run.config.train.seed) for run in runs),
        f"{max(gaps):.1e}" if gaps else "",
        str(config.train.steps),
        f"{mean(run.minutes for run in runs):.1f}",
        ", ".join(sorted({run.commit for run in runs})),
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
