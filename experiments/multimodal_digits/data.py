#!/usr/bin/env python3
"""Digits as a picture, as a sound and as a word, each too bad to tell the digit by itself.

python experiments/multimodal_digits/data.py FOLDER    writes FOLDER/train/*.tar and FOLDER/valid/*.tar
"""

import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]

from experiments.packages import package  # noqa: E402
from experiments.shards import Sample, png, shards_source, wav, write_data, write_shards  # noqa: E402
from experiments.speech import DIGITS, draw_speaker, spoken, with_noise  # noqa: E402

SEED = 1
SAMPLES = {"train": 18000, "valid": 1000}

HELD_OUT = 400  # of the 1,797 handwritten digits
ENLARGED = 2  # pixels a side for each of 8x8
ERASED = 10  # pixels a side of a square without ink, of 16
GREY_NOISE = 0.4  # standard deviation, where ink is 1

LENGTH = 5120  # samples of every sound, 0.64 s, wherever the word begins in it
SILENCED = 0.5  # of the word
SPEECH_TO_NOISE = 0.0  # dB

LANGUAGES = ("en", "de", "fr", "es", "it", "nl", "pt", "sv")
HIDDEN = 0.7  # of letters
MASK = "_"


def build(folder: Path, seed: int, samples: dict[str, int] = SAMPLES) -> None:
    """Write both splits. samples: how many of each"""
    for number, (split, count) in enumerate(samples.items()):
        write_shards(folder / split, drawn(split, count, np.random.default_rng([seed, number]), seed))


def drawn(split: str, count: int, draw: np.random.Generator, seed: int) -> Iterator[Sample]:
    """Samples of a split: the class first, then each of the three by itself."""
    pictures, classes = handwritten(split, seed)
    for _ in range(count):
        digit = int(draw.integers(10))
        picture = pictures[draw.choice(np.flatnonzero(classes == digit))]
        yield {
            "png": png(spoiled(picture, draw)),
            "wav": wav(heard(DIGITS[digit], split, draw)),
            "txt": hidden(words()[str(draw.choice(LANGUAGES))][digit], draw).encode(),
            "cls": str(digit).encode(),
        }


def handwritten(split: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The pictures of a split, fp64 [n, 8, 8] of 0 to 1 (ink), and the digits, int64 [n]."""
    digits = package("sklearn.datasets").load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    chosen = order[:HELD_OUT] if split == "valid" else order[HELD_OUT:]
    return digits.images[chosen] / 16, digits.target[chosen]


def spoiled(picture: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """A picture enlarged, with a square erased and with noise: uint8 [16, 16], ink is light."""
    large = picture.repeat(ENLARGED, 0).repeat(ENLARGED, 1)
    top, left = draw.integers(len(large) - ERASED + 1, size=2)
    large[top : top + ERASED, left : left + ERASED] = 0
    large = large + draw.normal(0, GREY_NOISE, large.shape)
    return (np.clip(large + 1, 0, 3) * 85).round().astype(np.uint8)  # the noise keeps its tails: ink is 85 of 255


def heard(word: str, split: str, draw: np.random.Generator) -> np.ndarray:
    """A word by a speaker of the split, a part of it silenced, somewhere in noise: fp64 [LENGTH]."""
    sound = spoken(word, draw_speaker(draw, split))[:LENGTH].copy()
    silenced = round(SILENCED * len(sound))
    begin = int(draw.integers(len(sound) - silenced + 1))
    sound[begin : begin + silenced] = 0
    before = int(draw.integers(LENGTH - len(sound) + 1))
    return with_noise(np.pad(sound, (before, LENGTH - len(sound) - before)), SPEECH_TO_NOISE, draw)


def hidden(word: str, draw: np.random.Generator) -> str:
    """A word with each letter hidden by chance, whatever the others are."""
    return "".join(MASK if draw.random() < HIDDEN else letter for letter in word)


@cache
def words() -> dict[str, list[str]]:
    """The digits' words by language, as num2words spells them."""
    num2words = package("num2words").num2words
    return {language: [num2words(digit, lang=language) for digit in range(10)] for language in LANGUAGES}


SOURCE = shards_source(__file__, "digits as a picture, a sound and a word", build, SEED)


if __name__ == "__main__":
    sys.exit(write_data(sys.argv[1:], build, SEED))
