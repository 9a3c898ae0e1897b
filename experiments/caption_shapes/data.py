#!/usr/bin/env python3
"""Small drawn scenes, each with the sentence that describes it.

python experiments/caption_shapes/data.py FOLDER    writes FOLDER/train/*.tar and FOLDER/valid/*.tar
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]

from experiments.drawings import PLACES, Thing, draw_things, picture  # noqa: E402
from experiments.shards import Sample, png, shards_source, write_data, write_shards  # noqa: E402

SEED = 1
SAMPLES = {"train": 6000, "valid": 600}
COUNTS = (1, 2, 3)  # of things


def build(folder: Path, seed: int, samples: dict[str, int] = SAMPLES) -> None:
    """Write both splits. samples: how many of each"""
    for number, (split, count) in enumerate(samples.items()):
        write_shards(folder / split, drawn(split, count, np.random.default_rng([seed, number])))


def drawn(split: str, count: int, draw: np.random.Generator) -> Iterator[Sample]:
    for _ in range(count):
        things = draw_things(draw, split, COUNTS)
        yield {"png": png(picture(things, draw)), "target.txt": sentence(things).encode()}


def sentence(things: Sequence[Thing]) -> str:
    """What a picture of things, in their order of place, is described as: one sentence, no other says the same.

    Two things in a row or a column are put in relation, others have their places.
    """
    if len(things) == 2:
        first, second = things
        if first.row == second.row:
            return f"at the {('top', 'bottom')[first.row]}, {phrase(first)} left of {phrase(second)}"
        if first.column == second.column:
            return f"on the {('left', 'right')[first.column]}, {phrase(first)} above {phrase(second)}"
    *most, last = [f"{phrase(thing)} at the {PLACES[thing.place]}" for thing in things]
    return f"{', '.join(most)} and {last}" if most else last


def phrase(thing: Thing) -> str:
    return f"a {thing.size} {thing.colour} {thing.shape}"


SOURCE = shards_source(__file__, "drawn scenes and sentences about them", build, SEED)


if __name__ == "__main__":
    sys.exit(write_data(sys.argv[1:], build, SEED))
