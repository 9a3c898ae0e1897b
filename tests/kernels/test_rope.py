"""Rotary positions: both backends against multiplication by complex numbers in fp64."""

from itertools import product

import pytest
import torch
from torch import Tensor

from megapar.kernels import use_backend
from megapar.kernels.rope import rope, rope_op, rope_table
from megapar.launch.pool import WorkerPool
from tests.kernels.cases import DTYPES, distance, poisoned_memory

THETA, POSITIONS = 10000.0, 64
# samples, length, query heads, key heads, channels
SIZES = [(1, 1, 1, 1, 2), (2, 7, 3, 1, 6), (2, 37, 4, 2, 32), (3, 5, 2, 2, 96)]


def by_complex_numbers(x: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """x [B, S, N, D] turned by positions [B, S]."""
    channels = x.shape[-1]
    angle = positions[..., None, None] * THETA ** (-torch.arange(0, channels, 2).double() / channels)
    pairs = x.unflatten(-1, (-1, 2)) if interleaved else x.unflatten(-1, (2, -1)).transpose(-1, -2)
    turned = torch.complex(pairs[..., 0], pairs[..., 1]) * torch.polar(torch.ones_like(angle), angle)
    turned = torch.view_as_real(turned)
    return (turned if interleaved else turned.transpose(-1, -2)).flatten(-2)


def given(size: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q and k as slices of one matrix with values that the dtype holds; their gradients."""
    b, s, n, k, d = size
    generator = torch.Generator().manual_seed(sum(size))
    fused, dq, dk = (torch.randn(b, s, c, d, generator=generator).to(dtype) for c in (n + 2 * k, n, k))
    return fused[:, :, :n], fused[:, :, n : n + k], dq, dk


def errors(rank: int, world_size: int, backend: str) -> list[tuple[str, float, float]]:
    """(case, largest error of q, k, dq, dk, in roundings of the dtype and of fp32, beside the largest value)."""
    use_backend(backend)
    found = []
    for (name, dtype), size, starts, interleaved in product(DTYPES.items(), SIZES, (False, True), (False, True)):
        q, k, dq, dk = given(size, dtype)
        b, s, _, _, d = size
        table = rope_table(POSITIONS, d, THETA, torch.float32, q.device)
        offsets = torch.tensor([3, 0, POSITIONS - s])[:b] if starts else None
        with poisoned_memory():
            q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
            turned = rope(q, k, table, offsets=offsets, interleaved=interleaved)
            outputs = (*turned, *torch.autograd.grad(turned, [q, k], [dq, dk]))
        positions = torch.arange(s) + (torch.zeros(b, dtype=torch.int64) if offsets is None else offsets)[:, None]
        exact = [by_complex_numbers(x.detach().double(), positions, interleaved) for x in (q, k)]
        exact += [by_complex_numbers(x.double(), -positions, interleaved) for x in (dq, dk)]
        rounding = torch.finfo(dtype).eps / 2 + 3 * torch.finfo(torch.float32).eps
        for output, a, c in zip(("q", "k", "dq", "dk"), outputs, exact, strict=True):
            assert a.dtype == dtype
            case = f"{name} {size} {'offsets' if starts else ''} {'interleaved' if interleaved else ''} {output}"
            found.append((case, distance(a.double(), c), rounding * float(c.abs().max())))
    return found


@pytest.mark.parametrize("backend", ["torch", "interpret"])
def test_both_conventions(backend: str, interpreter: WorkerPool) -> None:
    """Rounded once, to half of the dtype's epsilon; before that the table, two products and their sum are in fp32."""
    for case, error, allowed in interpreter.run(errors, 1, backend, timeout=300)[0]:
        assert error <= allowed, case


def check_operator(rank: int, world_size: int) -> None:
    use_backend("interpret")
    table = rope_table(9, 6, THETA, torch.float32, torch.device("cpu"))
    for offsets, flag in ((None, False), (torch.tensor([2, 0]), True)):
        q, k = (x.clone().requires_grad_() for x in given((2, 7, 3, 1, 6), torch.float32)[:2])
        torch.library.opcheck(rope_op, (q, k, table, offsets, flag, False))
    compiled = torch.compile(rope, backend="aot_eager", fullgraph=True)
    assert all(torch.equal(a, b) for a, b in zip(compiled(q, k, table), rope(q, k, table), strict=True))
    q, k = torch.zeros(2, 0, 3, 6), torch.zeros(2, 0, 1, 6)
    assert [x.shape for x in rope(q, k, table)] == [q.shape, k.shape]


def test_operator_passes_torchs_checks(interpreter: WorkerPool) -> None:
    interpreter.run(check_operator, 1, timeout=300)


def test_contradictions_are_refused() -> None:
    q, k, table = torch.zeros(2, 3, 4, 6), torch.zeros(2, 3, 1, 6), torch.zeros(5, 6)
    for arguments in (
        (q[0], k, table),
        (q, k[:, :2], table),
        (q, k.double(), table),
        (q, k, table[:2]),
        (q, k, table[:, :4]),
        (q[..., :5], k[..., :5], table[:, :5]),
        (q.int(), k.int(), table),
        (q, k, table.int()),
        (q, k, table.bfloat16()),
    ):
        with pytest.raises(ValueError, match="need"):
            rope(*arguments)
    past, before = torch.tensor([0, 3]), torch.tensor([-1, 0])  # the table has 5 positions, a sample 3
    for offsets in (torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.int32), past, before):
        with pytest.raises(ValueError, match="need"):
            rope(q, k, table, offsets=offsets)
