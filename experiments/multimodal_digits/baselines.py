#!/usr/bin/env python3
"""How far each of picture, sound and word goes by itself, and together where their log posteriors are added up.

python experiments/multimodal_digits/baselines.py FOLDER    FOLDER: what data.py wrote
"""

import re
import sys
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
from sklearn.calibration import CalibratedClassifierCV
from sklearn.decomposition import PCA
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]

from experiments.multimodal_digits.data import MASK, words  # noqa: E402
from experiments.shards import Sample, pixels_of, read_data, sound_of  # noqa: E402
from experiments.speech import log_mel  # noqa: E402

FRAMES, POOLED = 64, 4
COMPONENTS = 40
LEAST = 1e-4  # of a posterior, where a word excludes a class


def lines(train: list[Sample], valid: list[Sample]) -> Iterator[str]:
    """A row for each choice of the three: held-out accuracy."""
    labels = classes(train)
    posteriors = {
        "picture": by_support_vectors(pictures(train), pictures(valid), labels),
        "sound": by_support_vectors(sounds(train), sounds(valid), labels),
        "word": np.array([by_matching(sample["txt"].decode()) for sample in valid]),
    }
    yield "| accuracy, held out | of |"
    yield "|---|---|"
    for count in (1, 2, 3):
        for chosen in combinations(posteriors, count):
            total = sum(np.log(posteriors[name]) for name in chosen)
            yield f"| {np.mean(np.argmax(total, 1) == classes(valid)):.1%} | {' and '.join(chosen)} |"


def classes(samples: Sequence[Sample]) -> np.ndarray:
    return np.array([int(sample["cls"]) for sample in samples])


def pictures(samples: Sequence[Sample]) -> np.ndarray:
    """Their pixels, fp64 [samples, 256]."""
    return np.array([pixels_of(sample["png"]).ravel() / 255 for sample in samples])


def sounds(samples: Sequence[Sample]) -> np.ndarray:
    """Their log mel energies around where they are loudest, means of POOLED frames: fp64 [samples, values]."""
    found = []
    for sample in samples:
        levels = log_mel(sound_of(sample["wav"]))
        energy = np.exp(levels).sum(1)
        above = np.clip(energy - np.median(energy), 0, None)
        middle = round(above @ np.arange(len(above)) / above.sum())
        around = np.pad(levels, ((FRAMES, FRAMES), (0, 0)), mode="edge")[middle + FRAMES // 2 :][:FRAMES]
        found.append(around.reshape(FRAMES // POOLED, POOLED, -1).mean(1).ravel())
    return np.array(found)


def by_support_vectors(train: np.ndarray, valid: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Posteriors, fp64 [held-out samples, classes], of support vectors with a Gaussian kernel."""
    machine = make_pipeline(StandardScaler(), PCA(COMPONENTS, random_state=0), SVC(C=3))
    calibrated = CalibratedClassifierCV(machine, method="temperature", cv=3, ensemble=False)
    return np.asarray(calibrated.fit(train, labels).predict_proba(valid))


def by_matching(text: str) -> np.ndarray:
    """The exact posterior, fp64 [classes]: words that fit are equally likely, as letters are hidden independently."""
    pattern = re.compile(re.escape(text).replace(MASK, "."))
    fits = [[bool(pattern.fullmatch(word)) for word in spelled] for spelled in words().values()]
    counts = np.sum(fits, 0) + LEAST
    return counts / counts.sum()


if __name__ == "__main__":
    sys.exit(read_data(sys.argv[1:], lines))
