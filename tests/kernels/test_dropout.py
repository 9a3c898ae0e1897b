"""Dropout: the interpreted kernel's mask is torch's bit for bit, its values and gradients are right against fp64.

Masks are compared across layouts in tests/parallel.
"""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from megapar.kernels import use_backend
from megapar.kernels.dropout import dropout, dropout_op, keep_mask, site_key, token_keys
from megapar.launch.pool import WorkerPool
from tests.kernels.cases import DTYPES, distance, poisoned_memory

SITES = [(0, 0, 0, 0), (1234, 7, 3, 2), (2**63 - 1, 2**40, 0, 1)]
SHAPES = [(1, 1), (3, 17), (65, 64), (7, 2051)]


def places(tokens: int) -> tuple[Tensor, Tensor]:
    """Samples and positions, small and as large as they get."""
    numbers = torch.arange(tokens)
    return numbers // 3 + (numbers % 2) * (2**62), numbers % 3 + (numbers % 5 == 4) * 2**40


def masks(rank: int, world_size: int) -> list[tuple[str, bool, float]]:
    """(case, whether the mask is torch's, share that is kept) of ones, whose result is the mask in other words."""
    use_backend("interpret")
    found = []
    for site, (tokens, channels), rate in product(SITES, SHAPES, (0.0, 0.1, 0.9)):
        samples, positions = places(tokens)
        kept = dropout(torch.ones(tokens, channels), rate, samples, positions, site) != 0
        expected = keep_mask(1 - rate, token_keys(samples, positions, *site), channels)
        found.append((f"{site} {tokens}x{channels} {rate}", torch.equal(kept, expected), float(kept.float().mean())))
    return found


def test_the_mask_is_torchs(interpreter: WorkerPool) -> None:
    found = interpreter.run(masks, 1)[0]
    assert [case for case, same, _ in found if not same] == []
    large = {case: share for case, _, share in found if "7x2051" in case}
    for case, share in large.items():  # of 14357 draws a share is off by 0.0042 at most in 5 standard deviations
        assert abs(share - (1 - float(case.split()[-1]))) < 0.02, case


@pytest.mark.parametrize("site", SITES)
def test_the_key_of_a_site(site: tuple[int, ...]) -> None:
    """Made in Python, as torch makes it."""
    samples, positions = places(9)
    assert torch.equal(token_keys(samples, positions, *site), token_keys(samples + site_key(site), positions))


def errors(rank: int, world_size: int, dtype: str) -> list[tuple[str, float, float, float]]:
    """(case, error, torch's in the same dtype, largest value), against fp64, of slices."""
    found = []
    for (tokens, channels), adds in product(SHAPES, (False, True)):
        generator = torch.Generator().manual_seed(tokens + channels)
        both = torch.randn(tokens, 2 * channels + 1, generator=generator).to(DTYPES[dtype])
        dout = torch.randn(channels, tokens, generator=generator).to(DTYPES[dtype]).t()
        results = []
        with poisoned_memory():
            for backend, given in (("torch", both.double()), ("torch", both), ("interpret", both)):
                use_backend(backend)
                x, residual = given.detach().requires_grad_()[:, 1:].split(channels, 1)
                inputs = (x, residual) if adds else (x,)
                y = dropout(x, 0.3, *places(tokens), SITES[1], residual if adds else None)
                results.append([y, *torch.autograd.grad(y, inputs, dout.to(y.dtype))])
        exact, torchs, ours = ([x.detach().double() for x in result] for result in results)
        for name, a, b, c in zip(("y", "dx", "dresidual"), ours, torchs, exact, strict=False):
            found.append((f"{name} {tokens}x{channels}", distance(a, c), distance(b, c), float(c.abs().max())))
    return found


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_interpreted(dtype: str, interpreter: WorkerPool) -> None:
    """No error is more than torch's in the same dtype, or a few of fp32's last bits of the largest value."""
    for case, error, plain, size in interpreter.run(errors, 1, dtype)[0]:
        assert error <= plain + 2 * torch.finfo(torch.float32).eps * max(1.0, size), case


def test_in_torch() -> None:
    """To the bit what is written here; the gradient of what is added is the gradient of the sum."""
    x, residual = torch.randn(2, 5, 4, requires_grad=True).unbind()
    samples, positions = places(5)
    mask = keep_mask(0.7, token_keys(samples, positions, *SITES[1]), 4)
    y = dropout(x, 0.3, samples, positions, SITES[1], residual)
    assert torch.equal(y, residual + x * mask * (1.0 / 0.7))
    dx, dresidual = torch.autograd.grad(y, [x, residual], torch.ones_like(y))
    assert torch.equal(dx, mask * (1.0 / 0.7)) and torch.equal(dresidual, torch.ones_like(y))


def check_operators(rank: int, world_size: int) -> None:
    use_backend("interpret")
    x, residual = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    for added in (None, residual):
        torch.library.opcheck(dropout_op, (x, added, *places(3), list(SITES[1]), 0.3))

    def call(x: Tensor, residual: Tensor) -> Tensor:
        return dropout(x, 0.3, *places(3), SITES[1], residual)

    assert torch.equal(torch.compile(call, backend="aot_eager", fullgraph=True)(x, residual), call(x, residual))


def test_operators_pass_torchs_checks(interpreter: WorkerPool) -> None:
    interpreter.run(check_operators, 1, timeout=300)


def test_contradictions_are_refused() -> None:
    two, x = torch.arange(2), torch.ones(2, 3)

    def call(x: Tensor = x, rate: float = 0.5, samples: Tensor = two, **options: Any) -> None:
        dropout(x, rate, samples, two, (0,), **options)

    for wrong in (torch.ones(2, 3, dtype=torch.int32), torch.ones(2)):
        with pytest.raises(ValueError, match=r"need \[t, H\] in a floating dtype"):
            call(wrong)
    for rate in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="rate"):
            call(rate=rate)
    for samples in (torch.arange(3), two.int()):
        with pytest.raises(ValueError, match=r"samples .*: need int64 \[2\]"):
            call(samples=samples)
    for residual in (torch.ones(2, 4), x.double()):
        with pytest.raises(ValueError, match=r"residual .*: need \[2, 3\] torch.float32"):
            call(residual=residual)
