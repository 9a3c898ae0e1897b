"""Every kernel on tensors that end, and then begin, at a page that can't be touched: a stray access ends the process.

The kernels are those that have a benchmark, which is all of them (`tests/kernels/test_bench.py`); every launch that
their forward and backward make is moved to guarded memory, whatever its arguments are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megapar.bench.problem import Sizes
from megapar.bench.run import BENCHES
from megapar.kernels import use_backend
from megapar.kernels._common import Launch, TensorDescriptor
from megapar.launch.pool import PoolError, WorkerPool
from tests.kernels.cases import guarded

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
        held: dict[int, tuple[Tensor, Tensor]] = {}
        tensors = [x for x in launch.arguments.values() if isinstance(x, Tensor) and x.numel()]
        for x in sorted(tensors, key=extent):  # one that is passed twice, as residual and result, stays one
            flat = x.as_strided((extent(x),), (1,))
            held[x.data_ptr()] = (flat, guarded(flat, before))

        def moved(value: Any) -> Any:
            if isinstance(value, TensorDescriptor):
                return replace(value, base=moved(value.base))
            if isinstance(value, Tensor) and value.numel():
                return held[value.data_ptr()][1].as_strided(value.shape, value.stride())
            return value

        plain(replace(launch, arguments={name: moved(value) for name, value in launch.arguments.items()}))
        for flat, copy in held.values():
            flat.copy_(copy)

    with mock.patch.object(Launch, "run", run):
        yield names


def run_kernel(rank: int, world_size: int, kernel: str, sizes: Sizes, tokens: int) -> list[str]:
    """Forward and backward beside both kinds of page; the kernels that ran."""
    use_backend("interpret")
    ran: list[str] = []
    for before in (False, True):
        torch.manual_seed(0)
        problem = getattr(import_module(f"megapar.bench.{BENCHES[kernel]}"), kernel)(sizes, tokens, sizes.dtype, "cpu")
        with guarded_launches(before) as names:
            runner = problem.providers["megapar"]()
            runner.backward(runner.forward())
        ran += names
    return ran


@pytest.mark.parametrize("kernel", BENCHES)
@pytest.mark.parametrize("size", SIZES)
def test_no_kernel_reads_or_writes_outside_its_tensors(kernel: str, size: str, interpreter: WorkerPool) -> None:
    for tokens in TOKENS:
        ran = interpreter.run(run_kernel, 1, kernel, SIZES[size], tokens, timeout=300)[0]
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
