#!/usr/bin/env python3
"""Digits spoken one after the other, each string with what was said.

python experiments/transcribe_digits/data.py FOLDER    writes FOLDER/train/*.tar and FOLDER/valid/*.tar
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]

from experiments.shards import RATE, Sample, shards_source, wav, write_data, write_shards  # noqa: E402
from experiments.speech import DIGITS, Speaker, draw_speaker, spoken, with_noise  # noqa: E402

SEED = 1
SAMPLES = {"train": 8000, "valid": 500}
KNOWN, NEW = (1, 2, 3, 5), 4  # digits of a string: of training, and of every second one that is held out

PAUSES = (0.0, 0.3)  # seconds between two digits, at least and at most
ENDS = (0.05, 0.25)  # seconds in front of the first and behind the last
SPEECH_TO_NOISE = 15.0  # dB


def build(folder: Path, seed: int, samples: dict[str, int] = SAMPLES) -> None:
    """Write both splits. samples: how many of each"""
    for number, (split, count) in enumerate(samples.items()):
        write_shards(folder / split, drawn(split, count, np.random.default_rng([seed, number])))


def drawn(split: str, count: int, draw: np.random.Generator) -> Iterator[Sample]:
    for number in range(count):
        length = NEW if split == "valid" and number % 2 else int(draw.choice(KNOWN))
        words = [DIGITS[digit] for digit in draw.integers(10, size=length)]
        yield {
            "wav": wav(said(words, draw_speaker(draw, split), draw)),
            "target.txt": " ".join(words).encode(),
        }


def said(words: Sequence[str], speaker: Speaker, draw: np.random.Generator) -> np.ndarray:
    """Words by one speaker, with pauses, in light noise: fp64 [samples]."""
    pieces = [_silence(ENDS, draw)]
    for word in words:
        pieces += [spoken(word, speaker), _silence(PAUSES, draw)]
    pieces[-1] = _silence(ENDS, draw)
    return with_noise(np.concatenate(pieces), SPEECH_TO_NOISE, draw)


def _silence(seconds: tuple[float, float], draw: np.random.Generator) -> np.ndarray:
    return np.zeros(round(draw.uniform(*seconds) * RATE))


SOURCE = shards_source(__file__, "strings of spoken digits, and what was said", build, SEED)


if __name__ == "__main__":
    sys.exit(write_data(sys.argv[1:], build, SEED))
