"""The gradient norm is that of all elements, however many there are."""

import math

import pytest
import torch

from megapar.optim.optimizer import sum_of_squares

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [1, 1000, 65537, 5_000_000])
@pytest.mark.parametrize("runs", [1, 3])
def test_the_norm_is_exact_in_fp64(size: int, runs: int) -> None:
    """Against a formula: every value is 0.1 in fp32, whose square and its multiples fp64 holds to its last digits."""
    x = torch.full((size,), 0.1)
    exact = size * x[0].item() ** 2
    found = sum_of_squares(x.tensor_split(runs), CPU)
    assert found.shape == (1,) and found.dtype == torch.float64
    assert found.item() == pytest.approx(exact, rel=1e-13)


def test_the_bits_do_not_depend_on_threads() -> None:
    torch.manual_seed(0)
    x, threads = torch.randn(300_000), torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(sum_of_squares([x], CPU).item())
    finally:
        torch.set_num_threads(threads)
    assert found == [found[0]] * 3


def test_nothing_and_what_is_not_finite() -> None:
    assert sum_of_squares([], CPU).item() == 0.0
    assert sum_of_squares([torch.empty(0)], CPU).item() == 0.0
    assert math.isnan(sum_of_squares([torch.ones(5), torch.tensor([1.0, math.nan])], CPU).item())
    assert sum_of_squares([torch.tensor([1e30])], CPU).item() == pytest.approx(1e60, rel=1e-6)  # no overflow in fp32
