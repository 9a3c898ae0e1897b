"""The operations of kernels/comm in the forms that differ in who waits for whom, on operands of small whole numbers.

Sums and products of these are exact in fp32, so results are compared for equality. Operands differ in every epoch and
on every rank: data of another epoch, another rank or another tile is seen.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor

from megapar.kernels import matmul as plain
from megapar.kernels._common import check_overflow
from megapar.kernels.comm import matmul as fused
from megapar.kernels.comm.exchange import all_reduce
from megapar.kernels.comm.symmetric import SymmetricMemory

Shape = tuple[int, int, int]  # rows (of a rank where an operation gathers or scatters them), inner, columns

FORMS: dict[str, Callable[[Tensor, Tensor, SymmetricMemory], Tensor]] = {
    "all_reduce to all": lambda x, w, memory: all_reduce(x, memory, True),
    "all_reduce to owner": lambda x, w, memory: all_reduce(x, memory, False),
    "matmul_all_reduce to all": lambda x, w, memory: fused.start_matmul_all_reduce(x, w, memory, True)(),
    "matmul_all_reduce to owner": lambda x, w, memory: fused.start_matmul_all_reduce(x, w, memory, False)(),
    "matmul_reduce_scatter": lambda x, w, memory: fused.start_matmul_reduce_scatter(x, w, memory)(),
    "all_gather_matmul": lambda x, w, memory: torch.cat(fused.all_gather_matmul(x, w, memory), 1),
    # The last rank has no columns, and so waits for nothing but the handshake.
    "all_gather_matmul, idle": lambda x, w, memory: torch.cat(fused.all_gather_matmul(x, w, memory), 1),
}
LAUNCHES = {name: 3 if name.endswith("to owner") else 2 for name in FORMS}


def operands(form: str, shape: Shape, epoch: int, rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    """x and w of a rank; all_reduce takes x [rows, inner] alone."""
    rows, inner, columns = shape
    rows *= ranks if form == "matmul_reduce_scatter" else 1
    columns = 0 if form.endswith("idle") and rank == ranks - 1 else columns
    numbers = torch.Generator().manual_seed(1000 * epoch + rank)
    x, w = (torch.randint(-8, 9, size, generator=numbers) for size in ((rows, inner), (inner, columns)))
    return x.float(), w.float()


def expected(form: str, shape: Shape, epoch: int, rank: int, ranks: int) -> Tensor:
    every = [operands(form, shape, epoch, one, ranks) for one in range(ranks)]
    if form.startswith("all_gather_matmul"):
        gathered, w = torch.cat([x for x, _ in every]), every[rank][1]
        return torch.cat([gathered @ w, gathered if w.shape[1] else torch.zeros_like(gathered)], 1)
    if form.startswith("all_reduce"):
        return torch.stack([x for x, _ in every]).sum(0)
    total = torch.stack([x @ w for x, w in every]).sum(0)
    return total.chunk(ranks)[rank] if form == "matmul_reduce_scatter" else total


def is_exact(form: str, shape: Shape, epoch: int, memory: SymmetricMemory) -> bool:
    """Run a form on this rank's operands of an epoch; whether the result is the exact one."""
    x, w = operands(form, shape, epoch, memory.rank, memory.ranks)
    return torch.equal(FORMS[form](x, w, memory), expected(form, shape, epoch, memory.rank, memory.ranks))


@contextmanager
def small_tiles() -> Iterator[None]:
    """Tiles of 16, so that small matrices have several; and an interpreter that doesn't look for overflow."""
    tile = plain.Config(16, 16, 16, 4, 1, quarters=False)
    with ExitStack() as patches:
        for dtype in (2, 4):
            patches.enter_context(mock.patch.dict(plain.CONFIGS, {("interpret", dtype): (tile,)}))
        patches.callback(check_overflow, True)
        check_overflow(False)
        yield
