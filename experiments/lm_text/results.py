#!/usr/bin/env python3
"""The README's table: what runs reached on the held-out text, and what it costs without a neural network.

python experiments/lm_text/results.py RUN... [--readme FILE]    RUN: the folder of a finished run
"""

import json
import shlex
import sys
from argparse import ArgumentParser
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]

from experiments.lm_text.baselines import COMPRESSORS, PRIMED, compressed_bits, ngram_bits, primed_bits  # noqa: E402
from megapar.config.errors import UserError  # noqa: E402
from megapar.config.file import load  # noqa: E402
from megapar.config.keys import changed  # noqa: E402
from megapar.config.model import model_weights  # noqa: E402
from megapar.config.schema import ParallelConfig, PipelineConfig, RunConfig, TrainConfig  # noqa: E402
from megapar.data.samples import SampleSet  # noqa: E402
from megapar.data.source import Split, find_source  # noqa: E402
from megapar.data.tokenizer import open_tokenizer  # noqa: E402
from megapar.data.tokenizer.files import tokenizer_beside  # noqa: E402

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- figures: begin, by results.py -->", "<!-- figures: end -->"
ORDERS = 8  # of n-grams


def main(arguments: list[str]) -> int:
    parser = ArgumentParser(prog="results.py", description="Write the table of finished runs into a README.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--readme", type=Path, default=README, help="file to write into, between its markers")
    chosen = parser.parse_args(arguments)
    try:
        text = figures([Run.read(folder) for folder in chosen.runs])
        chosen.readme.write_text(between(chosen.readme.read_text(encoding="utf-8"), text), encoding="utf-8")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(chosen.readme)
    return 0


@dataclass(frozen=True)
class Run:
    """A finished run, as its folder tells it. facts: environment.json; rows: metrics.jsonl"""

    folder: Path
    config: TrainConfig
    overrides: list[str]
    facts: dict[str, Any]
    rows: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """Raises UserError for a folder without a finished run, and for a run without bits per character."""
        if not (folder / "summary.json").exists():
            raise UserError(f"{folder}: no finished run (no summary.json); give the run.dir of one")
        config = load(TrainConfig, folder / "config.yaml")
        overrides = yaml.safe_load((folder / "overrides.yaml").read_text(encoding="utf-8"))
        facts = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        if not any(row.get("val_bits_per_char") for row in rows):
            raise UserError(
                f"{folder}: no bits per character in metrics.jsonl; train on text, train.eval_every above 0"
            )
        return cls(folder, config, overrides, facts, rows)

    @property
    def bits(self) -> float:
        """Bits per character behind the last step."""
        return float([row["val_bits_per_char"] for row in self.rows if "val_bits_per_char" in row][-1])

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if "loss" in row]

    @property
    def layout(self) -> str:
        return str(self.config.parallel.layout)

    @property
    def commit(self) -> str:
        git = self.facts["git"]
        return "none" if git is None else git["revision"][:10] + " with changes" * git["dirty"]

    def samples(self, split: Split, **train: int) -> SampleSet:
        """Those of a split. train: keys of the section `train` that are other than the run's"""
        config = changed(self.config, {f"train.{key}": value for key, value in train.items()})
        samples = find_source(config.data.source).open(config, split)
        assert isinstance(samples, SampleSet)
        return samples


@dataclass(frozen=True)
class Texts:
    """The texts of a run, read from its tokens.

    train     the documents for training, end to end
    context   the token in front of the first that is predicted
    held_out  what every evaluation predicts, to the character
    counts    documents held out, and all
    """

    train: str
    context: str
    held_out: str
    counts: tuple[int, int]

    @classmethod
    def of(cls, run: Run) -> "Texts":
        """Raises UserError for a run whose evaluations left some of the held-out text out."""
        valid, train = run.samples("valid"), run.samples("train")
        if (seen := run.config.train.eval_samples) < valid.num_samples:
            raise UserError(
                f"{run.folder}: evaluated on {seen} of {valid.num_samples} held-out samples, and the baselines read "
                f"all; train with train.eval_samples={valid.num_samples}"
            )
        path = tokenizer_beside(run.config.data.prefix)
        assert path is not None, "bits per character are known"
        tokenizer = open_tokenizer(path)
        windows = valid.batch(range(valid.num_samples))
        [whole] = run.samples("train", seq_length=train.num_tokens - 1).batch([0])  # one window over all of it
        return cls(
            train=tokenizer.decode(whole),
            context=tokenizer.decode(windows[0, :1]),
            held_out=tokenizer.decode(windows[:, 1:].reshape(-1)),
            counts=(valid.num_documents, valid.num_documents + train.num_documents),
        )


def figures(runs: list[Run]) -> str:
    """Markdown of runs on one text: the held-out text, the table, and what reproduces it. Raises UserError."""
    texts = Texts.of(runs[0])
    for run in runs[1:]:
        if Texts.of(run) != texts:
            raise UserError(
                f"{run.folder}: another text, or another held-out part, than {runs[0].folder}; one table each"
            )
    held, total = texts.counts
    head = (
        f"Held out: {held} of {total} documents, of which {len(texts.held_out):,} characters are predicted; "
        f"trained on the others' {len(texts.train):,}."
    )
    rows = sorted([*map(model_row, runs), *baseline_rows(texts)], key=lambda row: row[0])
    lines = ["| bits/char | what | layout | seed | steps | tokens | minutes of steps | commit |", "|---" * 8 + "|"]
    lines += [f"| {bits:.3f} | {' | '.join(cells)} |" for bits, *cells in rows]
    cpu = sorted({f"{run.facts['cpu']['model']}, {run.facts['cpu']['cores']} cores" for run in runs})
    machine = f"Machine: {'; '.join(cpu)}. Commands, in the order of the runs above:"
    commands = [
        "```",
        *(f"megapar train {shlex.join(run.overrides)}" for run in sorted(runs, key=lambda run: run.bits)),
        "```",
    ]
    return "\n".join([head, "", *lines, "", *agreements(runs), machine, *commands])


def model_row(run: Run) -> tuple[Any, ...]:
    train = run.config.train
    tokens = len(run.steps) * train.global_batch_size * train.seq_length
    minutes = sum(row["step_time_s"] for row in run.steps) / 60
    what = f"**this model, {model_weights(run.config) / 1e6:.2f} M weights**"
    size = (str(len(run.steps)), f"{tokens / 1e6:.2f} M", f"{minutes:.1f}")
    return (run.bits, what, run.layout, str(train.seed), *size, run.commit)


def baseline_rows(texts: Texts) -> list[tuple[Any, ...]]:
    """The baselines on the same characters."""
    ngrams = ngram_bits(texts.train, texts.context, texts.held_out, ORDERS)
    found = [(bits, f"{order}-gram of characters") for order, bits in enumerate(ngrams, 1)]
    found += [(compressed_bits(name, texts.held_out), f"{name}, the held-out text alone") for name in COMPRESSORS]
    found += [(primed_bits(name, texts.train, texts.held_out), f"{name}, behind the training text") for name in PRIMED]
    return [(bits, what, *[""] * 6) for bits, what in found]


def agreements(runs: list[Run]) -> list[str]:
    """How far apart the losses are of runs that differ in nothing but their layout."""
    lines = []
    for one, two in combinations(runs, 2):
        if one.layout == two.layout or _without_layout(one) != _without_layout(two):
            continue
        pairs = list(zip(one.steps, two.steps, strict=True))
        apart = max(abs(first["loss"] - second["loss"]) for first, second in pairs)
        lines.append(
            f"Seed {one.config.train.seed}, {one.layout} beside {two.layout}: losses of {len(pairs)} steps differ by "
            f"at most {apart:.1e} nats/token, bits per character at the end by {abs(one.bits - two.bits):.1e}."
        )
    return [*lines, ""] if lines else []


def _without_layout(run: Run) -> TrainConfig:
    one = replace(run.config, parallel=ParallelConfig(), pipeline=PipelineConfig(), run=RunConfig())
    return changed(one, {"train.micro_batch_size": 1, "train.trace": None})


def between(text: str, new: str) -> str:
    """`text` with what is between its markers replaced. Raises UserError where it has none."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UserError(f"the README has no lines {BEGIN} and {END}; put them where the table belongs")
    return f"{before}{BEGIN}\n{new}\n{END}{after}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
