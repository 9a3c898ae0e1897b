"""Every kernel on tensors that end, and then begin, at a page that can't be touched: a stray access ends the process.

The calls are those of the benchmarks, of which every kernel has one (`tests/bench/test_bench.py`), and for what those
leave out, OPTIONAL. Every launch that forward and backward make is moved to guarded memory, whatever its arguments are.
What is seen is an access before the first element of a tensor, or after its last: not one between its rows.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megapar.bench.run import benches, maker
from megapar.kernels import layernorm as layer
from megapar.kernels import rmsnorm as rms
from megapar.kernels import use_backend
from megapar.kernels._common import Launch, TensorDescriptor
from megapar.kernels.attention import attention
from megapar.kernels.attention.fused import fused_attention_
from megapar.kernels.cross_entropy import (
    Objective,
    cross_entropy_gradient_,
    cross_entropy_statistics,
    merge_statistics,
)
from megapar.kernels.matmul import ACTIVATIONS, add_matmul, matmul
from megapar.kernels.rope import rope, rope_table
from megapar.kernels.shapes import Sizes
from megapar.launch.pool import PoolError, WorkerPool
from tests.kernels.cases import DTYPES, guarded

# in a part of a tile, in a tile and a bit, and with rows of whole 16 bytes, which TMA can read
SIZES = {
    "odd": Sizes(hidden=37, heads=4, kv_heads=2, head_dim=18, ffn=75, vocab=101, dtype="fp32"),
    "aligned": Sizes(hidden=136, heads=4, kv_heads=1, head_dim=40, ffn=264, vocab=520, dtype="bf16"),
}
TOKENS = (1, 67)


def extent(x: Tensor) -> int:
    """Elements from the first to the last of a tensor, those between its rows included."""
    return 1 + sum((length - 1) * stride for length, stride in zip(x.shape, x.stride(), strict=True))


@contextmanager
def guarded_launches(before: bool) -> Iterator[list[str]]:
    """Launches run on copies beside guard pages, whose contents are then copied back. Yields their kernels' names."""
    names: list[str] = []
    plain = Launch.run

    def run(launch: Launch) -> None:
        names.append(launch.kernel.fn.__name__)
        held: dict[int, Tensor] = {}
        tensors = [x for x in launch.arguments.values() if isinstance(x, Tensor) and x.numel()]
        for x in sorted(tensors, key=extent):  # one that is passed twice, as residual and result, stays one
            held[x.data_ptr()] = guarded(x.as_strided((extent(x),), (1,)), before)

        def moved(value: Any) -> Any:
            if isinstance(value, TensorDescriptor):
                return replace(value, base=moved(value.base))
            if isinstance(value, Tensor) and value.numel():
                return held[value.data_ptr()].as_strided(value.shape, value.stride())
            return value

        plain(replace(launch, arguments={name: moved(value) for name, value in launch.arguments.items()}))
        for x in tensors:  # its elements alone: between its rows there may be another's, as in a fused gradient
            x.copy_(moved(x))

    with mock.patch.object(Launch, "run", run):
        yield names


# ---------------------------------------------------------------------------------- what the benchmarks leave out


def normal(sizes: Sizes, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=DTYPES[sizes.dtype])


def attention_options(sizes: Sizes, tokens: int) -> None:
    """Packed sequences, a window and a softcap, or a bias, as long as the longest sequence."""
    q, k, v, do = (
        normal(sizes, tokens, heads, sizes.head_dim).requires_grad_()
        for heads in (sizes.heads, sizes.kv_heads, sizes.kv_heads, sizes.heads)
    )
    starts = torch.tensor([0, tokens // 2, tokens], dtype=torch.int32)
    o = attention(q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts, window=(tokens // 3, None), softcap=5.0)
    torch.autograd.grad(o, [q, k, v], do)
    bias = normal(sizes, sizes.heads, tokens - tokens // 2, tokens - tokens // 2).requires_grad_()
    o = attention(q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts, causal=False, bias=bias)
    torch.autograd.grad(o, [q, k, v, bias], do)


def fused_attention_options(sizes: Sizes, tokens: int) -> None:
    """q and k turned where they are, one gradient; also of packed sequences."""
    heads, channels = sizes.heads + 2 * sizes.kv_heads, sizes.head_dim
    table = rope_table(tokens, channels, 1e4, torch.float32, torch.device("cpu"))
    qkv, do = normal(sizes, 2 * tokens, heads * channels), normal(sizes, 2 * tokens, sizes.heads * channels)
    for starts in (None, torch.tensor([0, tokens // 2, 2 * tokens], dtype=torch.int32)):
        leaf = qkv.clone().requires_grad_()
        o = fused_attention_(leaf * 1, sizes.heads, sizes.kv_heads, tokens, table=table, starts=starts)
        torch.autograd.grad(o, leaf, do)


def norm_options(sizes: Sizes, tokens: int) -> None:
    """Of a sum, whose gradient is used too."""
    x, residual, dy, dh = (normal(sizes, tokens, sizes.hidden) for _ in range(4))
    weight, bias = normal(sizes, sizes.hidden), normal(sizes, sizes.hidden)
    _, h, rstd = rms.rmsnorm(x, weight, 1e-5, residual)
    rms.rmsnorm_input_grad(dy, h, weight, rstd, dh)
    _, h, mean, rstd = layer.layernorm(x, weight, bias, 1e-5, residual)
    layer.layernorm_input_grad(dy, h, weight, mean, rstd, dh)


def rope_options(sizes: Sizes, tokens: int) -> None:
    """Samples that begin at positions of their own, both kinds of pairs; of 6 channels a tile is wider than a head."""
    for channels, interleaved in ((sizes.head_dim, False), (6, True)):
        q, k = (normal(sizes, 2, tokens, heads, channels).requires_grad_() for heads in (sizes.heads, sizes.kv_heads))
        table = rope_table(tokens + 3, channels, 1e4, torch.float32, q.device)
        turned = rope(q, k, table, offsets=torch.tensor([3, 0]), interleaved=interleaved)
        torch.autograd.grad(turned, [q, k], turned)


def cross_entropy_options(sizes: Sizes, tokens: int) -> None:
    """A part of the vocabulary that has not every target, smoothed."""
    logits, targets = normal(sizes, tokens, sizes.vocab), torch.arange(tokens) * 2
    statistics = cross_entropy_statistics(logits, targets, 30, total=True)
    merged = merge_statistics(statistics.unsqueeze(0))
    objective = Objective(0.1, 1e-3, 2 * sizes.vocab)
    cross_entropy_gradient_(logits, targets, 30, merged.log_sum, torch.ones(tokens), objective)


def matmul_options(sizes: Sizes, tokens: int) -> None:
    """Every epilogue, operands laid out either way, an output among others."""
    x, w = normal(sizes, tokens, sizes.hidden), normal(sizes, sizes.hidden, sizes.ffn)
    bias, wide = normal(sizes, sizes.ffn), normal(sizes, tokens, sizes.ffn + 3)
    for activation in (None, *ACTIVATIONS):
        matmul(x, w, bias=bias, activation=activation, residual=wide[:, 3:], out=wide[:, 3:])
    matmul(x.t().contiguous().t(), w.t().contiguous().t(), bias=bias)
    add_matmul(torch.zeros(sizes.ffn, tokens).t(), x, w)


OPTIONAL: dict[str, Callable[[Sizes, int], None]] = {
    "attention": attention_options,
    "fused attention": fused_attention_options,
    "norms": norm_options,
    "rope": rope_options,
    "cross_entropy": cross_entropy_options,
    "matmul": matmul_options,
}


def run_benchmark(kernel: str, sizes: Sizes, tokens: int) -> None:
    """Forward and backward."""
    problem = maker(kernel)(sizes, tokens, sizes.dtype, "cpu")
    runner = problem.providers["megapar"]()
    runner.backward(runner.forward())


def run_kernel(rank: int, world_size: int, kernel: str, options: bool, sizes: Sizes, tokens: int) -> list[str]:
    """A call beside both kinds of page; the kernels that ran."""
    use_backend("interpret")
    ran: list[str] = []
    for before in (False, True):
        torch.manual_seed(0)
        with guarded_launches(before) as names:
            if options:
                OPTIONAL[kernel](sizes, tokens)
            else:
                run_benchmark(kernel, sizes, tokens)
        ran += names
    return ran


@pytest.mark.parametrize(
    ("kernel", "options"), [*((kernel, False) for kernel in benches()), *((kernel, True) for kernel in OPTIONAL)]
)
@pytest.mark.parametrize("size", SIZES)
def test_no_kernel_reads_or_writes_outside_its_tensors(
    kernel: str, options: bool, size: str, interpreter: WorkerPool
) -> None:
    for tokens in TOKENS:
        ran = interpreter.run(run_kernel, 1, kernel, options, SIZES[size], tokens, timeout=300)[0]
        assert len(ran) >= 4 and len(ran) % 2 == 0  # forward and backward, twice


def run_beyond(rank: int, world_size: int, before: bool) -> None:
    x = torch.randn(8, 8)
    with guarded_launches(before):
        from megapar.kernels import matmul

        use_backend("interpret")
        launch = matmul.launch("interpret", x, x, torch.empty(8, 8))
        name, wrong = ("a_stride", -8) if before else ("M", 9)
        replace(launch, arguments=launch.arguments | {name: wrong}).run()


@pytest.mark.parametrize("before", [False, True])
def test_a_stray_access_ends_the_process(before: bool, interpreter: WorkerPool) -> None:
    with pytest.raises(PoolError, match=r"SIGSEGV|died|signal 11"):
        interpreter.run(run_beyond, 1, before)
