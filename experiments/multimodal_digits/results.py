#!/usr/bin/env python3
"""The README's table: how often a run is right with picture, sound and word, with each pair of them and each alone.

python experiments/multimodal_digits/results.py RUN... [--readme FILE]    RUN: with the media.json of `megapar eval`
"""

import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]

from experiments.runs import Run, agreements, commands, share_of, write_table  # noqa: E402
from megapar.config.errors import UserError  # noqa: E402
from megapar.config.model import model_weights  # noqa: E402

README = Path(__file__).with_name("README.md")
MEDIA = "media.json"  # in a run's folder
MODALITIES = ("image", "audio", "text")
CALLED = {"image": "picture", "audio": "sound", "text": "word"}
ALL = "+".join(MODALITIES)
Kind = tuple[str, str]  # layout, and the modalities that a run has learned


def main(arguments: list[str]) -> int:
    return write_table(arguments, README, figures)


def figures(runs: list[Run]) -> str:
    """Markdown: the table, what it says, agreements of layouts, and what reproduces it. Raises UserError."""
    kinds: dict[Kind, list[Run]] = defaultdict(list)
    for run in runs:
        if run.config.task.name != "multimodal_classify":
            raise UserError(f"{run.folder}: no run of multimodal_digits; give those")
        kinds[run.layout, learned(run)].append(run)
    fused = {layout: found for (layout, modalities), found in kinds.items() if modalities == ALL}
    alone = {modalities: found for (_, modalities), found in kinds.items() if modalities != ALL}
    if not fused:
        raise UserError("none of the runs has learned from all three; give one that has")
    sets = list(accuracies(next(iter(fused.values()))[0]))
    heads = ["what is read", *(f"one model, {layout}" for layout in fused)] + ["trained on that alone"] * bool(alone)
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in sets:
        cells = [share_of([accuracies(run)[name] for run in found]) for found in fused.values()]
        if alone:
            cells.append(share_of([accuracies(run)[name] for run in alone[name]]) if name in alone else "")
        lines.append(f"| {called(name)} | {' | '.join(cells)} |")
    seeds = {", ".join(str(run.config.train.seed) for run in found) for found in (*fused.values(), *alone.values())}
    first = next(iter(fused.values()))[0]
    steps, weights = first.config.train.steps, model_weights(first.config) / 1e6
    minutes = mean(run.minutes for run in runs)
    seeds_of = "seed" if len(seeds) == 1 and "," not in "".join(seeds) else "seeds"
    said = (
        f"{steps:,} steps, {weights:.2f} M weights, {minutes:.1f} minutes a run; {seeds_of} {'; '.join(sorted(seeds))}."
    )
    return "\n".join(
        [
            *lines,
            "",
            said,
            *margins(fused, alone),
            "",
            *agreements(runs, "val_loss", "losses", "sample"),
            *commands(runs),
        ]
    )


def margins(fused: dict[str, list[Run]], alone: dict[str, list[Run]]) -> list[str]:
    """What all three are worth beyond the best pair, and how far one model is from those of its parts."""
    lines = []
    for layout, found in fused.items():
        means = {name: mean(accuracies(run)[name] for run in found) for name in accuracies(found[0])}
        best, pair = max((share, name) for name, share in means.items() if name.count("+") == 1)
        line = f"{layout}: all three are {100 * (means[ALL] - best):+.1f} points from {called(pair)}, the best pair"
        behind = {name: means[name] - mean(accuracies(run)[name] for run in runs) for name, runs in alone.items()}
        if behind:
            least, name = min((share, name) for name, share in behind.items())
            line += f"; at worst ({called(name)}) it is {100 * least:+.1f} points from a model of that alone"
        lines.append(f"{line}.")
    return lines


def accuracies(run: Run) -> dict[str, float]:
    """By what is read, all first. Raises UserError."""
    path = run.folder / MEDIA
    if not path.exists():
        raise UserError(f"{path}: missing; write it with `megapar eval {run.folder} media=SHARDS/valid out={path}`")
    found = json.loads(path.read_text(encoding="utf-8"))["media"]
    return {name: float(one["accuracy"]) for name, one in found.items() if isinstance(one, dict)}


def learned(run: Run) -> str:
    chosen: Sequence[str] = run.config.task.modalities or MODALITIES
    return "+".join(name for name in MODALITIES if name in chosen)


def called(name: str) -> str:
    return " and ".join(CALLED[one] for one in name.split("+"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
