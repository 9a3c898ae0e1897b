"""The experiment's data and baselines, and the drawings."""

from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest

from experiments import drawings
from experiments.caption_shapes import baselines, data
from experiments.drawings import HELD_OUT, PAIRS, PLACES, SEEN, Thing, picture
from experiments.shards import pixels_of
from tests.experiments.tools import built, texts


def test_the_samples(tmp_path: Path) -> None:
    train, valid = built(lambda folder, seed: data.build(folder, seed, {"train": 300, "valid": 60}), tmp_path)
    assert (len(train), len(valid)) == (300, 60)
    assert all(sorted(sample) == ["png", "target.txt"] for sample in train + valid)
    assert {pixels_of(sample["png"]).shape for sample in train + valid} == {(32, 32, 3)}
    shown = [[baselines.things_of(text) for text in texts(samples, "target.txt")] for samples in (train, valid)]
    assert {len(things) for things in shown[0]} == {len(things) for things in shown[1]} == {1, 2, 3}
    pairs = [[{thing.pair for thing in things} for things in split] for split in shown]
    assert set.union(*pairs[0]) == set(SEEN)
    assert all(scene & set(HELD_OUT) for scene in pairs[1]) and set.union(*pairs[1]) > set(HELD_OUT)
    rows = list(baselines.lines(train, valid))
    assert [row.split(" |")[0] for row in rows[2:4]] == ["| 0.0%"] * 2 and len(rows) == 5


def test_what_is_held_out_is_seen_in_parts() -> None:
    assert len(SEEN) + len(HELD_OUT) == len(PAIRS) == 24 and not set(SEEN) & set(HELD_OUT)
    for part in (0, 1):
        assert {pair[part] for pair in SEEN} == {pair[part] for pair in PAIRS}


def test_a_sentence_says_what_is_where() -> None:
    """Every sentence is taken apart into the things it was made of, so no two scenes have the same."""
    for count in data.COUNTS:
        for places in combinations(range(len(PLACES)), count):
            kinds = product(drawings.SIZES, ("red", "blue"), ("star", "circle"))
            for chosen in list(product(kinds, repeat=count))[::7]:
                things = [Thing(*kind, place) for kind, place in zip(chosen, places, strict=True)]
                assert baselines.things_of(data.sentence(things)) == things
    first, second = Thing("large", "red", "circle", 0), Thing("small", "blue", "star", 3)
    assert (
        data.sentence([first, second]) == "a large red circle at the top left and a small blue star at the bottom right"
    )


@pytest.mark.parametrize("shape", drawings.SHAPES)
def test_a_thing_is_in_its_quarter(shape: str) -> None:
    """Its colour is there and nowhere else; a large one has more of it."""
    for place in range(len(PLACES)):
        areas = []
        for size in drawings.SIZES:
            pixels = picture([Thing(size, "red", shape, place)], np.random.default_rng(0)).astype(int)
            red = pixels[..., 0] - pixels[..., 2] > 60
            areas.append(red.sum())
            top, left = 16 * (place // 2), 16 * (place % 2)
            assert red[top : top + 16, left : left + 16].sum() == red.sum()
        assert 8 < areas[0] < areas[1] / 2


def test_words_right() -> None:
    assert baselines.words_right(["a red star", "a b"], ["a red circle", "a b c"]) == pytest.approx(4 / 6)


def test_quarters() -> None:
    draw = np.random.default_rng(0)
    scenes = [drawings.draw_things(draw, "train", data.COUNTS) for _ in range(300)]
    pixels = np.array([picture(things, draw) / 255 for things in scenes])
    known = [data.sentence(things) for things in scenes]
    right = [one == other for one, other in zip(baselines.by_quarter(pixels, known, pixels), known, strict=True)]
    assert np.mean(right) > 0.95 and baselines.nearest(pixels, known, pixels[:5]) == known[:5]
