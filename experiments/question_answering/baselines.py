#!/usr/bin/env python3
"""Answers without a neural network: the most frequent one, that of the nearest training sample, what was named last.

python experiments/question_answering/baselines.py FOLDER    FOLDER: what data.py wrote
"""

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.neighbors import NearestNeighbors

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]

from experiments.drawings import COLOURS, SHAPES  # noqa: E402
from experiments.question_answering.passages import OBJECTS, PEOPLE, ROOMS, named_last  # noqa: E402
from experiments.question_answering.scenes import SIDES  # noqa: E402
from experiments.shards import Sample, pixels_of, read_data  # noqa: E402

KINDS = {
    "COLOUR": COLOURS,
    "SHAPE": SHAPES,
    "PERSON": PEOPLE,
    "OBJECT": OBJECTS,
    "ROOM": ROOMS,
    "SIDE": [side for side, _, _ in SIDES],
}


def lines(train: list[Sample], valid: list[Sample]) -> Iterator[str]:
    """A row for each form of question, and for all about pictures and about passages."""
    known, asked = by_form(train), by_form(valid)
    yield "| held out | question | most frequent answer | nearest training sample | named last |"
    yield "|---" * 5 + "|"
    for media, name in ((True, "about pictures"), (False, "about passages")):
        rows = []
        for form in sorted(asked):
            samples = asked[form]
            if ("png" in samples[0]) == media:
                rows.append(right(known[form], samples))
                yield row(rows[-1], form)
        yield row(np.concatenate(rows), f"**all {name}**")


def row(found: np.ndarray, name: str) -> str:
    shares = ["" if np.isnan(share) else f"{share:.1%}" for share in found.mean(0)]
    return f"| {len(found)} | {name} | {' | '.join(shares)} |"


def right(known: Sequence[Sample], samples: Sequence[Sample]) -> np.ndarray:
    """What is right of the three ways to answer questions of one form: fp64 [samples, 3], of 0 and 1; NaN where a way
    has no answer, as nothing is named in a picture."""
    truth = np.array(answers(samples))
    last = all_named_last(samples) if "png" not in samples[0] else None
    ways = [[Counter(answers(known)).most_common(1)[0][0]] * len(samples), nearest(known, samples), last]
    return np.stack([np.full(len(truth), np.nan) if way is None else np.array(way) == truth for way in ways], 1)


def answers(samples: Sequence[Sample]) -> list[str]:
    return [sample["target.txt"].decode() for sample in samples]


def by_form(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    """Samples by their question, in which a kind of word stands for all its words."""
    found: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        form = question(sample)
        for kind, words in KINDS.items():
            form = re.sub(rf"\b({'|'.join(words)})(?=s?\b)", kind, form)
        found[form].append(sample)
    return found


def question(sample: Sample) -> str:
    return re.split(r"[.>] ", sample["txt"].decode())[-1]


def nearest(known: Sequence[Sample], samples: Sequence[Sample]) -> list[str]:
    """The answer of the training sample whose picture differs least in its pixels, or whose text has most in common, in
    words and pairs of words weighted by their rarity."""
    if "png" in samples[0]:
        seen, asked = (np.array([pixels_of(one["png"]).ravel() / 255 for one in few]) for few in (known, samples))
    else:
        counts = TfidfVectorizer(ngram_range=(1, 2)).fit([one["txt"].decode() for one in known])
        seen, asked = (counts.transform([one["txt"].decode() for one in few]) for few in (known, samples))
    search = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(seen)
    found = answers(known)
    return [found[place] for place in search.kneighbors(asked)[1][:, 0]]


def all_named_last(samples: Sequence[Sample]) -> list[str]:
    """What is named last of the kind that is asked for."""
    asked = [question(sample) for sample in samples]
    texts = [sample["txt"].decode() for sample in samples]
    return [named_last(text.removesuffix(words), words) for text, words in zip(texts, asked, strict=True)]


if __name__ == "__main__":
    sys.exit(read_data(sys.argv[1:], lines))
