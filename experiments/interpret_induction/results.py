#!/usr/bin/env python3
"""The README's table: what every head looks at, and what the copy loses without it, in three layouts.

python experiments/interpret_induction/results.py RUN... [--readme FILE]
"""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]

from experiments.interpret_induction.data import VOCABULARY, repeated  # noqa: E402
from experiments.runs import Run, commands, write_table  # noqa: E402
from megapar.config.check import with_layout  # noqa: E402
from megapar.config.errors import UserError  # noqa: E402
from megapar.config.keys import changed  # noqa: E402
from megapar.config.layout import Layout  # noqa: E402
from megapar.config.schema import TrainConfig  # noqa: E402
from megapar.interpret.capture import Capture  # noqa: E402
from megapar.interpret.patch import Patch  # noqa: E402
from megapar.interpret.reading import read  # noqa: E402
from megapar.launch.pool import WorkerPool  # noqa: E402
from megapar.part import ModelPart, open_part  # noqa: E402

README = Path(__file__).with_name("README.md")
LAYOUTS = ("single", "tp2", "pp2")
SAMPLES = 128  # held out
HALF = 0.5  # of a head's attention, and it is an induction head


@dataclass(frozen=True)
class Heads:
    """induction, previous: [layers, N], how much a query of the repeated half sees of what stood behind its earlier
    copy, and of the token in front of itself, on average
    loss: nats per token that repeats one; without: [layers, N], the same where a head says in the second copy what it
        says there when the first is none; without_found, without_others: where all induction heads do, and all others
    """

    induction: np.ndarray
    previous: np.ndarray
    loss: float
    without: np.ndarray
    without_found: float
    without_others: float

    @property
    def found(self) -> np.ndarray:
        """bool [layers, N]: the induction heads."""
        return self.induction > HALF


def main(arguments: list[str]) -> int:
    return write_table(arguments, README, figures)


def figures(runs: list[Run]) -> str:
    """Markdown: a table of heads for each run, what the layouts agree on, and what reproduces it. Raises UserError."""
    parts = []
    with WorkerPool(2) as pool:
        for run in runs:
            if run.config.data.source != "interpret_induction":
                raise UserError(f"{run.folder}: no run of interpret_induction; give those")
            found = [heads_in(pool, run, layout) for layout in LAYOUTS]
            parts += [table(run, found[0]), "", said(found), ""]
    return "\n".join([*parts, *commands(runs)])


def heads_in(pool: WorkerPool, run: Run, layout: str) -> Heads:
    """What a run's heads do, as a layout computes it in fp64."""
    config = with_layout(changed(run.config, {"train.dtype": "fp64", "train.device": "cpu"}), Layout.parse(layout))
    found: list[Heads] = pool.run(look, config.parallel.layout.world, config, str(run.folder), timeout=600.0)
    return found[0]


def look(rank: int, world_size: int, config: TrainConfig, folder: str) -> Heads:
    """The same, on every rank of it."""
    part, _ = open_part(config, folder, rank)
    model, length = config.model, config.train.seq_length + 1
    drawn = [repeated("valid", number, length) for number in range(SAMPLES)]
    tokens = torch.from_numpy(np.stack([one for one, _ in drawn]))
    counts = torch.tensor([count for _, count in drawn]).unsqueeze(1)
    # Queries whose next token repeats one: of the copy all tokens but the last.
    copied = (torch.arange(length - 1) >= length - counts).nonzero().T
    # The same but for the first copy, in whose place are other tokens.
    first = (torch.arange(length) >= length - 2 * counts) & (torch.arange(length) < length - counts)
    drawn_anew = torch.from_numpy(np.random.default_rng(0).integers(VOCABULARY, size=tokens.shape))
    other = torch.where(first, drawn_anew, tokens)
    sites = [f"layers.{index}.attention" for index in range(model.layers)]
    with Capture(part, [f"{site}.heads" for site in sites]) as unlike:
        read(part, other[:, :-1])
    with Capture(part, [f"{site}.{name}" for site in sites for name in ("weights", "heads")]) as seen:
        read(part, tokens[:, :-1])
    weights = torch.stack([seen[f"{site}.weights"] for site in sites])  # [layers, samples, S, N, S]
    instead = {}
    for site in sites:
        instead[f"{site}.heads"] = seen[f"{site}.heads"].clone()  # [samples, S, N, D]
        instead[f"{site}.heads"][tuple(copied)] = unlike[f"{site}.heads"][tuple(copied)]

    def loss_without(gone: np.ndarray) -> float:
        """gone: bool [layers, N]"""
        with ExitStack() as patches:
            for (name, values), row in zip(instead.items(), gone, strict=True):
                if row.any():
                    patches.enter_context(Patch(part, {name: values}, blocks=np.flatnonzero(row).tolist()))
            return loss_of(part, tokens, copied)

    induction = seen_at(weights, copied, 1 - counts)
    without = np.zeros_like(induction)
    for place in np.ndindex(without.shape):
        alone = np.zeros_like(without, dtype=bool)
        alone[place] = True
        without[place] = loss_without(alone)
    heads = Heads(
        induction=induction,
        previous=seen_at(weights, copied, torch.full_like(counts, -1)),
        loss=loss_of(part, tokens, copied),
        without=without,
        without_found=loss_without(induction > HALF),
        without_others=loss_without(induction <= HALF),
    )
    part.close()
    return heads


def seen_at(weights: Tensor, copied: Tensor, away: Tensor) -> np.ndarray:
    """Mean weight, over queries that are copied, of the key so far away, [samples, 1]: [layers, N]."""
    samples, queries = copied
    return weights[:, samples, queries, :, queries + away[samples, 0]].mean(0).numpy()


def loss_of(part: ModelPart, tokens: Tensor, copied: Tensor) -> float:
    """Nats per token that repeats one."""
    with Capture(part, ["logits"]) as seen:
        read(part, tokens[:, :-1])
    samples, queries = copied
    return cross_entropy(seen["logits"][samples, queries], tokens[samples, queries + 1]).item()


def table(run: Run, heads: Heads) -> str:
    """A row for each head."""
    train = run.config.train
    made = f"Seed {train.seed}, {train.steps:,} steps as {run.layout}, {run.minutes:.1f} minutes, commit {run.commit}"
    lines = [
        f"{made}: {heads.loss:.4f} nats per token that repeats one.",
        "",
        "| head | sees what stood behind the earlier copy | sees the token in front | loss without it | more by |",
        "|---|---|---|---|---|",
    ]
    for layer, head in np.ndindex(heads.without.shape):
        shares = (f"{one[layer, head]:.1%}" for one in (heads.induction, heads.previous))
        loss = heads.without[layer, head]
        lines.append(f"| {layer}.{head} | {' | '.join(shares)} | {loss:.4f} | {loss - heads.loss:+.4f} |")
    return "\n".join(lines)


def said(found: Sequence[Heads]) -> str:
    """Which head does it, and whether the layouts say the same."""
    first = found[0]
    pairs = [(heads.induction - first.induction, heads.without - first.without) for heads in found]
    apart = max(np.abs(difference).max() for pair in pairs for difference in pair)
    alike = all(np.array_equal(heads.found, first.found) for heads in found)
    names = ", ".join(f"{layer}.{head}" for layer, head in np.argwhere(first.found)) or "none"
    more = first.without - first.loss
    others = more[~first.found].max(initial=-np.inf)
    found_more, others_more = first.without_found - first.loss, first.without_others - first.loss
    return (
        f"Induction heads: {names}, {'the same' if alike else 'not the same'} in {', '.join(LAYOUTS)}, whose figures "
        f"differ by at most {apart:.1e}. Without all of these the loss is more by {found_more:.2f}, without all the "
        f"others by {others_more:.2f}, without one of the others by at most {others:.2f}."
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
