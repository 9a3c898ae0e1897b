"""Ranks of kernels/comm that share one process and its GPU: plain tensors are the segments, a stream is a rank."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megapar.kernels._common import target_arch
from megapar.kernels.comm import matmul as fused
from megapar.kernels.comm.exchange import all_reduce
from megapar.kernels.comm.symmetric import Channel, SymmetricMemory, aligned

Shape = tuple[int, int, int]  # rows (of a rank where an operation gathers or scatters them), inner, columns

# The operations of kernels/comm, in the forms that differ in who waits for whom. all_reduce takes x alone.
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
# Interpreted, a launch ends before the next begins: only these can run, as in them no rank waits for a later launch.
IN_TURN = ("matmul_all_reduce to all", "matmul_reduce_scatter")


class OneProcess(SymmetricMemory):
    """One of `ranks` ranks. shared: the segments of all, by what they were made for."""

    def __init__(self, rank: int, ranks: int, device: torch.device, shared: dict[Any, list[Tensor]], processors: int):
        self.device, self.timeout_s = device, 0.0
        self.channels, self.empty_calls = {}, Counter()
        self.rank, self.ranks, self.peers, self.limit = rank, ranks, list(range(ranks)), 16
        self.error = torch.zeros(1, dtype=torch.int64, device=device)
        self.arch, self.processors, self.shared = target_arch(), processors, shared
        self._side = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def _make(self, operation: str, num_flags: int, half: int, call: str) -> Channel:
        assert operation not in self.channels, "calls of one operation are alike here"
        key = operation, num_flags, aligned(half)
        if key not in self.shared:
            size = Channel.size(self.ranks, num_flags, key[2])
            self.shared[key] = [torch.zeros(size, dtype=torch.uint8, device=self.device) for _ in range(self.ranks)]
        owns = self.shared[key]
        table = torch.tensor([own.data_ptr() for own in owns], dtype=torch.int64, device=self.device)
        channel = Channel(SimpleNamespace(own=owns[self.rank], table=table), self.ranks, num_flags, key[2])
        self.channels[operation] = channel
        return channel

    def restart(self, limit: int) -> None:
        """As if nothing had been called yet, with all memory there. limit: polls of a wait from now on."""
        self.error.zero_()
        self.limit = limit
        for channel in self.channels.values():
            channel.epoch, channel.in_use = 0, False


def begin(form: str, x: Tensor, w: Tensor, memory: SymmetricMemory) -> Callable[[], Tensor]:
    """Start a form; the result ends it."""
    if form == "matmul_reduce_scatter":
        return fused.start_matmul_reduce_scatter(x, w, memory)
    if form.startswith("matmul_all_reduce"):
        return fused.start_matmul_all_reduce(x, w, memory, form.endswith("to all"))
    return partial(FORMS[form], x, w, memory)  # card-only


def operands_of(
    form: str, shape: Shape, epoch: int, ranks: int, dtype: torch.dtype, device: str
) -> list[tuple[Tensor, Tensor]]:
    """x and w of every rank: whole numbers, so small that the dtype holds every sum, and others in every epoch."""
    rows, inner, columns = shape
    rows *= ranks if form == "matmul_reduce_scatter" else 1
    most, found = 8 if dtype == torch.float32 else 1, []
    for rank in range(ranks):
        numbers = torch.Generator().manual_seed(1000 * epoch + rank)
        width = 0 if form.endswith("idle") and rank == ranks - 1 else columns
        x, w = (torch.randint(-most, most + 1, size, generator=numbers) for size in ((rows, inner), (inner, width)))
        found.append((x.to(device, dtype), w.to(device, dtype)))
    return found


def expected(form: str, every: list[tuple[Tensor, Tensor]], rank: int) -> Tensor:
    """What a rank's call must return, in fp64."""
    wide = [(x.double(), w.double()) for x, w in every]
    if form.startswith("all_gather_matmul"):
        gathered, w = torch.cat([x for x, _ in wide]), wide[rank][1]
        return torch.cat([gathered @ w, gathered if w.shape[1] else torch.zeros_like(gathered)], 1)
    total = torch.stack([x if form.startswith("all_reduce") else x @ w for x, w in wide]).sum(0)
    return total.chunk(len(every))[rank] if form == "matmul_reduce_scatter" else total
