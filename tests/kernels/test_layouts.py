"""Every kernel on tensors that lie in memory in any order, where a size of 1 may have any stride.

torch makes such strides all the time: of a slice, a transpose or a view of one row. A kernel that takes them at their
word reads, or writes, elsewhere.
"""

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megapar.kernels import layernorm as layer
from megapar.kernels import rmsnorm as rms
from megapar.kernels import use_backend
from megapar.kernels._common import FARTHEST, matrix
from megapar.kernels.attention import attention
from megapar.kernels.cross_entropy import Objective, cross_entropy_gradient_, cross_entropy_statistics
from megapar.kernels.dropout import dropout
from megapar.kernels.matmul import add_matmul, matmul
from megapar.kernels.rope import rope, rope_table
from megapar.kernels.swiglu import swiglu
from megapar.launch.pool import WorkerPool
from tests.kernels.cases import distance

CPU = torch.device("cpu")
Call = tuple[str, Callable[..., Any], list[Tensor]]


def laid_out(x: Tensor, draw: random.Random) -> Tensor:
    """A copy with its dims in any order, with gaps, and any stride where there is nothing to step over."""
    strides, step = [0] * x.dim(), 1
    for dim in draw.sample(range(x.dim()), x.dim()):
        if x.shape[dim] == 1:
            strides[dim] = draw.choice([0, 1, 2, 7, 64])
        else:
            step *= draw.choice([1, 1, 2, 8])
            strides[dim] = step
            step *= x.shape[dim]
    return torch.zeros(step, dtype=x.dtype).as_strided(x.shape, strides).copy_(x)


def added(into: Tensor, a: Tensor, b: Tensor) -> Tensor:
    add_matmul(into, a, b)
    return into


def gradients(q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    return torch.autograd.grad(attention(*leaves), leaves, do)


def calls(draw: random.Random, dtype: torch.dtype) -> Iterator[Call]:
    """Calls of small sizes, many of them 1."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    M, K, N = (draw.choice([1, 1, 2, 8]) for _ in range(3))
    epilogue = [normal(N), normal(M, N)]
    yield "matmul", lambda a, b, bias, r: matmul(a, b, bias=bias, residual=r), [normal(M, K), normal(K, N), *epilogue]
    T, H = draw.choice([1, 1, 5]), draw.choice([1, 2, 16])
    rows, column = (lambda: normal(T, H)), (lambda: torch.rand(T))
    yield "rmsnorm", lambda x, w, r: rms.rmsnorm(x, w, 1e-5, r), [rows(), normal(H), rows()]
    yield "rmsnorm_input_grad", rms.rmsnorm_input_grad, [rows(), rows(), normal(H), column(), rows()]
    yield "rmsnorm_weight_grad", rms.rmsnorm_weight_grad, [rows(), rows(), column()]
    yield "layernorm_input_grad", layer.layernorm_input_grad, [rows(), rows(), normal(H), column(), column(), rows()]
    yield "layernorm_weight_grad", layer.layernorm_weight_grad, [rows(), rows(), column(), column()]
    yield "swiglu", swiglu, [rows(), rows()]
    places = [torch.randint(9, (T,)), torch.randint(9, (T,))]
    yield "dropout", lambda x, s, p, r: dropout(x, 0.5, s, p, (1, 2), r), [rows(), *places, rows()]
    targets = torch.randint(H, (T,))
    yield "statistics", lambda x, t: cross_entropy_statistics(x, t, 0, True), [rows(), targets]
    gradient = lambda x, t, s, g: cross_entropy_gradient_(x, t, 0, s, g, Objective())  # noqa: E731
    yield "gradient", gradient, [rows(), targets, column() + 3, column()]
    B, S, heads, D = draw.choice([1, 1, 3]), draw.choice([1, 1, 7]), draw.choice([1, 2]), draw.choice([2, 16])
    q, do, k, v = (normal(B, S, n, D) for n in (2 * heads, 2 * heads, heads, heads))
    yield (
        "rope",
        lambda q, k, t, o: rope(q, k, t, offsets=o),
        [q, k, rope_table(9, D, 1e4, torch.float32, CPU), targets[:1].expand(B) % 2],
    )
    yield "attention", lambda q, k, v: attention(q, k, v, return_lse=True), [q, k, v]
    yield "attention's gradients", gradients, [q, k, v, do]
    ends = torch.tensor([0, S, B * S], dtype=torch.int32)
    packed = lambda q, k, v, s: attention(q, k, v, cu_seqlens_q=s, cu_seqlens_k=s)  # noqa: E731
    yield "packed attention", packed, [*(x.flatten(0, 1) for x in (q, k, v)), ends]


def compare(rank: int, world_size: int, draws: int) -> list[tuple[str, list[Any], float]]:
    """(call, its tensors' strides, largest difference from the same call on contiguous copies)."""
    use_backend("interpret")
    draw, found = random.Random(rank), []
    torch.manual_seed(rank)
    for dtype in draws * (torch.float32, torch.bfloat16):
        for name, function, given in calls(draw, dtype):
            views = [laid_out(x, draw) for x in given]
            strides = [(list(x.shape), x.stride()) for x in views]
            outputs = [function(*x) for x in (views, [x.clone(memory_format=torch.contiguous_format) for x in given])]
            pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in outputs), strict=True)
            error = max(distance(a.double(), b.double()) for a, b in pairs)
            found.append((f"{name} in {dtype}", strides, error))
    return found


@pytest.mark.more
def test_any_layout(interpreter: WorkerPool) -> None:
    for part in interpreter.run(compare, 2, 3, timeout=300):
        for call, strides, error in part:
            assert error < (0.05 if "bfloat16" in call else 1e-5), (call, strides)


def write_anywhere(rank: int, world_size: int, backend: str, seed: int) -> None:
    """into and out of any layout are written where they are, or are refused and left alone."""
    use_backend(backend)
    draw = random.Random(seed)
    torch.manual_seed(seed)
    for dtype in (torch.float32, torch.bfloat16):
        for _ in range(6):
            M, K, N = (draw.choice([1, 1, 2, 8]) for _ in range(3))
            a, b = (laid_out(torch.randn(*shape).to(dtype), draw) for shape in ((M, K), (K, N)))
            into, out = laid_out(torch.randn(M, N), draw), laid_out(torch.randn(M, N).to(dtype), draw)
            before = into.clone()
            if 1 in (*into.stride(), *into.shape):
                add_matmul(into, a, b)
                assert distance(into.double(), before.double() + a.double() @ b.double()) < 0.1, into.stride()
            else:
                with pytest.raises(ValueError, match="rows or columns that lie together"):
                    add_matmul(into, a, b)
                assert torch.equal(into, before)
            if N == 1 or out.stride(1) == 1:
                assert matmul(a, b, out=out) is out
                assert distance(out.double(), a.double() @ b.double()) < 0.1, out.stride()


@pytest.mark.parametrize("backend", ["torch", "interpret"])
def test_results_of_any_layout(backend: str, interpreter: WorkerPool) -> None:
    for seed in range(2):
        interpreter.run(write_anywhere, 1, backend, seed)


def test_rows_too_far_apart_are_copied() -> None:
    """A tile's rows are counted from its first in 32 bits."""
    near, far = (torch.empty_strided((3, 1, 16), (step, 16, 1), device="meta") for step in (FARTHEST, FARTHEST + 1))
    assert matrix(near).stride() == (FARTHEST, 1) and matrix(far).stride() == (16, 1)
    assert 127 * FARTHEST < 1 << 31
