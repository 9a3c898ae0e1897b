"""The README's table of experiments that write about images and sound: exact match by kinds of samples."""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from experiments.runs import Run, agreements, commands, share_of
from megapar.config.errors import UserError
from megapar.config.model import model_weights
from megapar.config.stages import stage_names

MEDIA = "media.json"  # in a run's folder
Item = dict[
    str, Any
]  # of a held-out sample: `text` that was read, the `right` answer, and the `answer`; see `megapar eval`


def items_of(run: Run) -> list[Item]:
    """Of all held-out samples, with all modalities. Raises UserError."""
    path = run.folder / MEDIA
    if not path.exists():
        raise UserError(f"{path}: missing; write it with `megapar eval {run.folder} media=SHARDS/valid out={path}`")
    found = json.loads(path.read_text(encoding="utf-8"))["media"]
    first: list[Item] = next(one["items"] for one in found.values() if isinstance(one, dict))
    return first


def table(runs: Sequence[Run], kinds: Callable[[Item], Sequence[str]], columns: Sequence[str]) -> str:
    """Markdown: a row for each layout, a column for all samples and for each kind; agreements of layouts, and what
    reproduces it. kinds: those that a sample is of; columns: their names. Raises UserError."""
    grouped: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        if run.config.task.name != "multimodal_lm":
            raise UserError(f"{run.folder}: no run that writes about images or sound; give those")
        grouped[run.layout].append(run)
    heads = ["exact match, held out", *columns, "layout", "stages", "seeds", "steps", "minutes", "commit"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for layout, found in grouped.items():
        shares = [_shares(items_of(run), kinds) for run in found]
        cells = [
            *(share_of([one[name] for one in shares]) for name in ("", *columns)),
            layout,
            " \\| ".join(stage_names(found[0].config)),
            ", ".join(str(run.config.train.seed) for run in found),
            str(found[0].config.train.steps),
            f"{mean(run.minutes for run in found):.1f}",
            ", ".join(sorted({run.commit for run in found})),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    said = f"{model_weights(runs[0].config) / 1e6:.2f} M weights."
    return "\n".join([*lines, "", said, "", *agreements(runs, "val_loss", "held-out losses"), *commands(runs)])


def _shares(items: Sequence[Item], kinds: Callable[[Item], Sequence[str]]) -> dict[str, float]:
    """Right ones of all (""), and of each kind."""
    found: dict[str, list[bool]] = defaultdict(list)
    for item in items:
        for name in ("", *kinds(item)):
            found[name].append(item["answer"] == item["right"])
    return {name: mean(right) for name, right in found.items()}


def readme(module: str) -> Path:
    """That of the experiment whose results.py this is."""
    return Path(module).with_name("README.md")
