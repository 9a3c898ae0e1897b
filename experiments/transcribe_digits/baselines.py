#!/usr/bin/env python3
"""Spoken digits without a neural network: cut where it is silent, and each piece compared with single words.

python experiments/transcribe_digits/baselines.py FOLDER    FOLDER: what data.py wrote
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]

from experiments.shards import Sample, read_data, sound_of  # noqa: E402
from experiments.speech import log_mel  # noqa: E402
from experiments.transcribe_digits.data import KNOWN, NEW  # noqa: E402

ABOVE = 1.5  # nats over the noise: louder frames are speech
BRIDGED = 6  # frames of 10 ms: a shorter silence is within a word
SHORTEST = 6  # frames of a word
STEPS = 12  # of time that a word's frames are stretched or squeezed to


def lines(train: list[Sample], valid: list[Sample]) -> Iterator[str]:
    """A row for each way to compare: exact match of strings, by their number of words, and word error rate."""
    truth, cut = words_of(valid), [pieces(sample) for sample in valid]
    features, labels = single_words(train)
    ways: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "the nearest of ten means": NearestCentroid().fit(features, labels).predict,
        f"the nearest of {len(labels)} single words": KNeighborsClassifier(1).fit(features, labels).predict,
    }
    yield f"| exact match, held out | of {NEW} words | of {', '.join(map(str, KNOWN))} words | word error rate | what |"
    yield "|---" * 5 + "|"
    for name, predict in ways.items():
        answers = [[str(word) for word in predict(np.array(found))] if found else [] for found in cut]
        right = np.array([answer == said for answer, said in zip(answers, truth, strict=True)])
        new = np.array([len(said) == NEW for said in truth])
        wrong = sum(edits(answer, said) for answer, said in zip(answers, truth, strict=True)) / sum(map(len, truth))
        yield f"| {right.mean():.1%} | {right[new].mean():.1%} | {right[~new].mean():.1%} | {wrong:.1%} | {name} |"
    counted = np.mean([len(found) == len(said) for found, said in zip(cut, truth, strict=True)])
    yield f"\nCut into as many pieces as there are words: {counted:.1%}"


def words_of(samples: Sequence[Sample]) -> list[list[str]]:
    return [sample["target.txt"].decode().split() for sample in samples]


def single_words(train: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray]:
    """Of strings of one word that are one piece: fp64 [strings, STEPS * bands], and the words."""
    found = [(pieces(sample), said[0]) for sample, said in zip(train, words_of(train), strict=True) if len(said) == 1]
    whole = [(cut[0], word) for cut, word in found if len(cut) == 1]
    return np.array([piece for piece, _ in whole]), np.array([word for _, word in whole])


def pieces(sample: Sample) -> list[np.ndarray]:
    """What is loud between silences, as STEPS log mel frames less their mean: fp64 [STEPS * bands] each."""
    levels = log_mel(sound_of(sample["wav"]))
    loudness = np.log(np.exp(levels).sum(1))
    loud = np.flatnonzero(loudness > np.quantile(loudness, 0.05) + ABOVE)
    found = []
    for run in np.split(loud, np.flatnonzero(np.diff(loud) > BRIDGED) + 1):
        if len(run) >= SHORTEST:
            steps = np.linspace(run[0], run[-1], STEPS).round().astype(int)
            found.append((levels[steps] - levels[steps].mean()).ravel())
    return found


def edits(answer: Sequence[str], said: Sequence[str]) -> int:
    """Words to put in, leave out or replace until one is the other (Levenshtein 1966)."""
    row = list(range(len(said) + 1))
    for number, word in enumerate(answer, 1):
        before, row[0] = row[0], number
        for place, other in enumerate(said, 1):
            before, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, before + (word != other))
    return row[-1]


if __name__ == "__main__":
    sys.exit(read_data(sys.argv[1:], lines))
