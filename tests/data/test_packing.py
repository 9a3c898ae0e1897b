"""Sequences in rows: each once, none too long, the same rows for the same lengths."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megapar.data.packing import pack


@given(st.lists(st.integers(1, 20), max_size=60))
def test_every_sequence_stands_in_one_row(lengths: list[int]) -> None:
    rows = pack(np.array(lengths, dtype=np.int64), 20)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[number] for number in row) <= 20 for row in rows)
    assert rows == pack(np.array(lengths, dtype=np.int64), 20)
    # Best fit leaves no two rows that would fit into one.
    used = sorted(sum(lengths[number] for number in row) for row in rows)
    assert len(used) < 2 or used[0] + used[1] > 20


def test_the_tightest_row_is_filled() -> None:
    assert pack(np.array([6, 7, 3, 4, 10, 1]), 10) == [[4], [1, 2], [0, 3], [5]]


def test_many() -> None:
    lengths = np.random.default_rng(0).integers(1, 2000, size=50_000)
    rows = pack(lengths, 2048)
    assert sum(map(len, rows)) == 50_000 and lengths.sum() / (len(rows) * 2048) > 0.99
