#!/usr/bin/env python3
"""Descriptions without a neural network: sentences of training, and a classifier that is told much.

python experiments/caption_shapes/baselines.py FOLDER    FOLDER: what data.py wrote
"""

import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from sklearn.neighbors import NearestNeighbors
from sklearn.svm import SVC

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]

from experiments.caption_shapes.data import sentence  # noqa: E402
from experiments.drawings import CELL, PLACES, Thing  # noqa: E402
from experiments.shards import Sample, pixels_of, read_data  # noqa: E402

NONE = ("", "", "")  # of an empty quarter
SHOWN = 2000  # training pictures that the classifiers of quarters learn from


def lines(train: list[Sample], valid: list[Sample]) -> Iterator[str]:
    """A row for each baseline."""
    truth = sentences(valid)
    known, seen, asked = sentences(train), pictures(train), pictures(valid)
    found = {
        "the most frequent sentence": Counter(known).most_common(1)[0][:1] * len(truth),
        "the sentence of the nearest training picture": nearest(seen, known, asked),
        "quarters classified one by one": by_quarter(seen[:SHOWN], known[:SHOWN], asked),
    }
    yield "| exact match, held out | words right | what |"
    yield "|---|---|---|"
    for name, answers in found.items():
        exact = np.mean([answer == right for answer, right in zip(answers, truth, strict=True)])
        yield f"| {exact:.1%} | {words_right(answers, truth):.1%} | {name} |"


def sentences(samples: Sequence[Sample]) -> list[str]:
    return [sample["target.txt"].decode() for sample in samples]


def pictures(samples: Sequence[Sample]) -> np.ndarray:
    """fp64 [samples, side, side, 3]"""
    return np.array([pixels_of(sample["png"]) / 255 for sample in samples])


def words_right(answers: Sequence[str], truth: Sequence[str]) -> float:
    """The share of the right words that stand in their place, counted from the beginning."""
    right = total = 0
    for answer, true in zip(answers, truth, strict=True):
        expected = true.split()
        right += sum(one == other for one, other in zip(answer.split(), expected, strict=False))
        total += len(expected)
    return right / total


def nearest(seen: np.ndarray, known: Sequence[str], asked: np.ndarray) -> list[str]:
    """The sentence of the picture that differs least in its pixels, by squares."""
    search = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(seen.reshape(len(seen), -1))
    return [known[place] for place in search.kneighbors(asked.reshape(len(asked), -1))[1][:, 0]]


def by_quarter(seen: np.ndarray, known: Sequence[str], asked: np.ndarray) -> list[str]:
    """What is in a quarter has three classifiers, of size, colour and shape, by support vectors on its pixels. They are
    told the quarters, what is in which, and how a sentence is made."""
    features = _quarters(seen)
    labels = [[kinds.get(place, NONE) for place in range(len(PLACES))] for kinds in map(_kinds, known)]
    answers = np.array(
        [SVC(C=10).fit(features, column).predict(_quarters(asked)) for column in np.array(labels).reshape(-1, 3).T]
    ).T.reshape(len(asked), len(PLACES), 3)
    shown = [
        [
            Thing(size, colour, shape, place)
            for place, (size, colour, shape) in enumerate(row)
            if size and colour and shape
        ]
        for row in answers.tolist()
    ]
    return [sentence(things) if things else "" for things in shown]


def _quarters(pixels: np.ndarray) -> np.ndarray:
    """fp64 [pictures * 4, values], a picture's in the order of PLACES."""
    cut = pixels.reshape(len(pixels), 2, CELL, 2, CELL, 3).transpose(0, 1, 3, 2, 4, 5)
    return cut.reshape(len(pixels) * len(PLACES), -1)


def _kinds(text: str) -> dict[int, tuple[str, ...]]:
    """What a sentence says: (size, colour, shape) by place."""
    return {thing.place: (thing.size, thing.colour, thing.shape) for thing in things_of(text)}


def things_of(text: str) -> list[Thing]:
    """The inverse of `sentence`."""
    kinds = re.findall(r"a (\w+) (\w+) (\w+)", text)
    if " left of " in text:
        row = 2 * text.startswith("at the bottom")
        places = [row, row + 1]
    elif " above " in text:
        column = text.startswith("on the right")
        places = [0 + column, 2 + column]
    else:
        places = [PLACES.index(place) for place in re.findall(r"at the (\w+ \w+)", text)]
    return [Thing(size, colour, shape, place) for (size, colour, shape), place in zip(kinds, places, strict=True)]


if __name__ == "__main__":
    sys.exit(read_data(sys.argv[1:], lines))
