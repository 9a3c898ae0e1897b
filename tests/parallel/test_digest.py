"""Digests of bits: every change is seen, and nothing but bits counts."""

import numpy as np
import pytest
import torch

from megapar.parallel.digest import _PIECE, digest


@pytest.mark.parametrize("size", [1, 7, 8, 9, 64, 8 * _PIECE + 3], ids=str)
def test_every_bit_counts(size: int) -> None:
    """Of bytes; beyond a piece at seeded places."""
    random = np.random.default_rng(0)
    x = torch.from_numpy(random.integers(0, 256, size, dtype=np.uint8))
    whole = int(digest(x))
    places = range(8 * size) if size < 100 else random.integers(0, 8 * size, 200).tolist()
    found = {whole}
    for place in places:
        x[place // 8] ^= 1 << place % 8
        found.add(int(digest(x)))
        x[place // 8] ^= 1 << place % 8
    assert len(found) == len(set(places)) + 1 and int(digest(x)) == whole


def test_order_sign_and_length_count() -> None:
    x = torch.arange(1.0, 11.0, dtype=torch.float64)
    signs = x.clone()
    signs[[2, 7]] *= -1  # the top bits of two words
    others = [
        x.flip(0),
        signs,
        x[:-1],
        torch.cat([x, x.new_zeros(1)]),
        x.clone().index_fill_(0, torch.tensor([3]), 0.0),
    ]
    assert len({int(digest(one)) for one in (x, *others)}) == 6
    assert int(digest(torch.tensor([0.0]))) != int(digest(torch.tensor([-0.0])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.int64])
def test_where_it_lies_does_not_count(dtype: torch.dtype) -> None:
    memory = torch.arange(200).to(dtype)
    for start in range(9):
        view = memory[start : start + 30].view(5, 6)
        assert int(digest(view)) == int(digest(view.clone()))
        assert int(digest(view.t())) == int(digest(view.t().contiguous()))
