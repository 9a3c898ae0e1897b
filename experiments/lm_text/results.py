#!/usr/bin/env python3
"""The README's table: what runs reached on the held-out text, and what it costs without a neural network.

python experiments/lm_text/results.py RUN... [--readme FILE]    RUN: the folder of a finished run
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]

from experiments.lm_text.baselines import COMPRESSORS, PRIMED, compressed_bits, ngram_bits, primed_bits  # noqa: E402
from experiments.runs import Run, agreements, commands, write_table  # noqa: E402
from megapar.config.errors import UserError  # noqa: E402
from megapar.config.keys import changed  # noqa: E402
from megapar.config.model import model_weights  # noqa: E402
from megapar.data.samples import SampleSet  # noqa: E402
from megapar.data.source import Split, find_source  # noqa: E402
from megapar.data.tokenizer import open_tokenizer  # noqa: E402
from megapar.data.tokenizer.files import tokenizer_beside  # noqa: E402

README = Path(__file__).with_name("README.md")
BITS = "val_bits_per_char"
ORDERS = 8  # of n-grams


def main(arguments: list[str]) -> int:
    return write_table(arguments, README, figures)


def samples_of(run: Run, split: Split, **train: int) -> SampleSet:
    """The samples of a split of a run's data. train: keys of the section `train` that are other than the run's"""
    config = changed(run.config, {f"train.{key}": value for key, value in train.items()})
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
        valid, train = samples_of(run, "valid"), samples_of(run, "train")
        if (seen := run.config.train.eval_samples) < valid.num_samples:
            raise UserError(
                f"{run.folder}: evaluated on {seen} of {valid.num_samples} held-out samples, and the baselines read "
                f"all; train with train.eval_samples={valid.num_samples}"
            )
        path = tokenizer_beside(run.config.data.prefix)
        assert path is not None, "bits per character are known"
        tokenizer = open_tokenizer(path)
        windows = valid.batch(range(valid.num_samples))
        [whole] = samples_of(run, "train", seq_length=train.num_tokens - 1).batch([0])  # one window over all of it
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
    about = commands(sorted(runs, key=lambda run: run.last(BITS)))
    return "\n".join([head, "", *lines, "", *agreements(runs, BITS, "bits per character"), *about])


def model_row(run: Run) -> tuple[Any, ...]:
    train = run.config.train
    tokens = len(run.steps) * train.global_batch_size * train.seq_length
    what = f"**this model, {model_weights(run.config) / 1e6:.2f} M weights**"
    size = (str(len(run.steps)), f"{tokens / 1e6:.2f} M", f"{run.minutes:.1f}")
    return (run.last(BITS), what, run.layout, str(train.seed), *size, run.commit)


def baseline_rows(texts: Texts) -> list[tuple[Any, ...]]:
    """The baselines on the same characters."""
    ngrams = ngram_bits(texts.train, texts.context, texts.held_out, ORDERS)
    found = [(bits, f"{order}-gram of characters") for order, bits in enumerate(ngrams, 1)]
    found += [(compressed_bits(name, texts.held_out), f"{name}, the held-out text alone") for name in COMPRESSORS]
    found += [(primed_bits(name, texts.train, texts.held_out), f"{name}, behind the training text") for name in PRIMED]
    return [(bits, what, *[""] * 6) for bits, what in found]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
