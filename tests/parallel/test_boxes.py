"""Runs of elements as boxes, against plain enumeration."""

import itertools

import numpy as np
import pytest

from megapar.parallel.boxes import Box, boxes_of_run


@pytest.mark.parametrize("shape", [(7,), (3, 4), (4, 1), (1, 5), (2, 3, 4), (2, 1, 3, 2)])
def test_boxes_of_every_run(shape: tuple[int, ...]) -> None:
    numbers = np.arange(np.prod(shape)).reshape(shape)
    whole = Box((0,) * len(shape), shape)
    for start, stop in itertools.combinations_with_replacement(range(numbers.size + 1), 2):
        boxes = boxes_of_run(start, stop, shape)
        assert len(boxes) <= 2 * len(shape) - 1
        assert all(box.fits(shape) for box in boxes)
        found = [number for box in boxes for number in numbers[box.within(whole)].flat]
        assert found == list(range(start, stop))


def test_overlap() -> None:
    numbers = np.arange(30).reshape(5, 6)
    whole = Box((0, 0), (5, 6))
    one = Box((1, 2), (3, 4))
    for offset in itertools.product(range(5), range(6)):
        for shape in itertools.product(range(1, 6 - offset[0]), range(1, 7 - offset[1])):
            other = Box(offset, shape)
            common = one.overlap(other)
            expected = set(numbers[one.within(whole)].flat) & set(numbers[other.within(whole)].flat)
            assert (set() if common is None else set(numbers[common.within(whole)].flat)) == expected
            if common is not None:
                assert set(numbers[other.within(whole)][common.within(other)].flat) == expected


@pytest.mark.parametrize(
    ("offset", "shape"),
    [((0, 0), (5, 7)), ((1, 0), (5, 6)), ((-1, 0), (1, 1)), ((0, 0), (0, 1)), ((0,), (5,)), ((0, 0, 0), (1, 1, 1))],
)
def test_boxes_outside(offset: tuple[int, ...], shape: tuple[int, ...]) -> None:
    assert not Box(offset, shape).fits((5, 6))
