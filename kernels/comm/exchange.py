"""Rows of a matrix to the ranks that need them, and their sums: what a collective is besides a matmul.

A matrix [M, N] of every rank is cut into tiles [rows, width], and each tile has a flag of its own. Where it goes:

| way     | a tile goes to      | a rank's half then holds                                 |
|---------|---------------------|----------------------------------------------------------|
| to all  | every rank          | [R, M, N], every rank's matrix                           |
| to owner| the owner of its row| [R, block, N], every rank's rows of the block it owns    |

The block of an owner is `block` = ceil(M / R) rows; to all, block = M. Sums are taken in fp32 in the order of ranks and
rounded once, so every rank has the same bits, in every run. A rank's own part goes through its own segment too.

Shape letters: R ranks, M rows, N columns.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megapar.kernels._common import Launch, cast, cdiv, device_function, num_tiles, tl, triton
from megapar.kernels.comm.symmetric import (
    SymmetricMemory,
    Use,
    aligned,
    await_flag,
    begin,
    described_use,
    post,
    segment_of,
    unless,
)
from megapar.kernels.registry import Kernel
from megapar.kernels.shapes import LLAMA

# Programs that move data beside a matmul on a GPU, each on a processor that the matmul leaves free: enough to fill
# NVLink, from published kernels (Triton-distributed: 16); not measured.
MOVERS = 16
# Registers of a thread of `push`, at most, and its warps: see `comm.matmul.room_beside_push`.
PUSH_REGISTERS, PUSH_WARPS = 80, 4
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # what is added in fp32
# Bytes of a matrix below which every rank sums all of it: one pass over the links and R - 1 times the bytes, instead of
# two passes and 2 (R - 1) / R times. By ranks of one host, up to 2 (which send the same either way), 4 and 8. From
# vLLM's custom_all_reduce.cuh, for NVLink; not measured here.
TO_ALL_BELOW = {2: 1 << 62, 4: 512 << 10, 8: 256 << 10}


def is_small(size: int, ranks: int) -> bool:
    """Whether every rank should sum all of a matrix of this many bytes."""
    return size < TO_ALL_BELOW[min((known for known in TO_ALL_BELOW if known >= ranks), default=8)]


def _flops_and_bytes(grid: Any, kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
    """What a profiler is told: a matrix is read, R of them to be added up, and written, to R ranks to be shared."""
    sums, shares = "SHARE" in args, args.get("SHARE") or args.get("TO_ALL")
    copies = args["RANKS"] * (sums + bool(shares)) + 2 - sums - bool(shares)
    element = next(args[name].element_size() for name in ("x", "data", "out") if args.get(name) is not None)
    flops = (args["RANKS"] - 1) * args["M"] * args["N"] * sums
    return {"name": kernel.name, "flops32": flops, "bytes": copies * args["M"] * args["N"] * element}


@device_function
def store_to(
    table, peer, data_at, tile, row, column, N, end, DTYPE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write a tile to row `row` of a matrix [.., N] in a peer's half, its rows before `end` only."""
    rows, columns = row + tl.arange(0, ROWS)[:, None], column + tl.arange(0, COLUMNS)[None, :]
    into = segment_of(table, peer, data_at, DTYPE) + rows.to(tl.int64) * N + columns
    tl.store(into, tile, mask=(rows < end) & (columns < N))


@triton.jit(launch_metadata=_flops_and_bytes, do_not_specialize=["mark", "flags_at", "data_at", "rank"])
def push_kernel(
    x, table, begun, flags, error, rank, mark, operation, limit, flags_at, data_at,
    M, N, x_stride, block, width, RANKS: tl.constexpr, TO_ALL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """x [M, N] to all or to the owners of its rows; a flag for each [ROWS, width]. Grid: any number of programs."""
    begin(table, begun, mark, error, rank, operation, limit, RANKS)
    across = cdiv(N, width)
    of_block = cdiv(block, ROWS) * across
    for number in range(tl.program_id(0), unless(error, cdiv(M, block) * of_block), tl.num_programs(0)):
        owner, tile = number // of_block, number % of_block
        top, first = tile // across * ROWS, tile % across * width
        end = tl.minimum(block, M - owner * block)
        rows = top + tl.arange(0, ROWS)[:, None]
        for column in range(first, tl.minimum(first + width, N), COLUMNS):
            columns = column + tl.arange(0, COLUMNS)[None, :]
            from_x = x + (owner * block + rows).to(tl.int64) * x_stride + columns
            part = tl.load(from_x, mask=(rows < end) & (columns < N), other=0.0)
            for peer in range(RANKS):
                if TO_ALL or peer == owner:
                    store_to(
                        table, peer, data_at, part, rank * block + top, column, N, rank * block + end,
                        x.dtype.element_ty, ROWS, COLUMNS,
                    )  # fmt: skip
        tl.debug_barrier()
        for peer in range(RANKS):
            if TO_ALL or peer == owner:
                post(table, peer, flags_at, rank * of_block + tile, mark)


@triton.jit(launch_metadata=_flops_and_bytes, do_not_specialize=["mark", "flags_at", "results_at", "rank"])
def reduce_kernel(
    data, out, table, begun, flags, error, rank, mark, operation, limit, flags_at, results_at,
    M, N, block, RANKS: tl.constexpr, SHARE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums of the M rows of this rank's block over all ranks, from data [R, block, N].

    To out [M, N]; SHARE: to the results [R * block, N] in every rank's half instead. Their flags follow the data's.
    """
    across = cdiv(N, COLUMNS)
    of_block = cdiv(block, ROWS) * across
    for tile in range(tl.program_id(0), cdiv(M, ROWS) * across, tl.num_programs(0)):
        top, column = tile // across * ROWS, tile % across * COLUMNS
        rows, columns = top + tl.arange(0, ROWS)[:, None], column + tl.arange(0, COLUMNS)[None, :]
        inside = (rows < M) & (columns < N)
        sums = tl.zeros([ROWS, COLUMNS], tl.float32)
        for peer in range(RANKS):
            await_flag(flags + peer * of_block + tile, mark, error, rank, peer, operation, limit)
            summand = data + (peer * block + rows).to(tl.int64) * N + columns
            sums += tl.load(summand, mask=inside, other=0.0).to(tl.float32)
        if SHARE:
            part = cast(sums, data.dtype.element_ty)
            for peer in range(RANKS):
                store_to(
                    table, peer, results_at, part, rank * block + top, column, N, rank * block + M,
                    data.dtype.element_ty, ROWS, COLUMNS,
                )  # fmt: skip
            tl.debug_barrier()
            for peer in range(unless(error, RANKS)):
                post(table, peer, flags_at, (RANKS + rank) * of_block + tile, mark)
        else:
            tl.store(out + rows.to(tl.int64) * N + columns, cast(sums, out.dtype.element_ty), mask=inside)


@triton.jit(launch_metadata=_flops_and_bytes, do_not_specialize=["mark", "flags_at", "rank"])
def collect_kernel(
    results, out, table, begun, flags, error, rank, mark, operation, limit, flags_at,
    M, N, block, RANKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out [M, N] from the results in this rank's half, as their owners finish them."""
    across = cdiv(N, COLUMNS)
    of_block = cdiv(block, ROWS) * across
    for number in range(tl.program_id(0), cdiv(M, block) * of_block, tl.num_programs(0)):
        owner, tile = number // of_block, number % of_block
        top, column = tile // across * ROWS, tile % across * COLUMNS
        end = tl.minimum((owner + 1) * block, M)
        rows = owner * block + top + tl.arange(0, ROWS)[:, None]
        columns = column + tl.arange(0, COLUMNS)[None, :]
        if owner * block + top < end:
            await_flag(
                flags + (RANKS + owner) * of_block + tile, mark, error, rank, owner, operation, limit
            )  # fmt: skip
            at, inside = rows.to(tl.int64) * N + columns, (rows < end) & (columns < N)
            tl.store(out + at, tl.load(results + at, mask=inside, other=0.0), mask=inside)


# ------------------------------------------------------------------------------------------------------------- launches


@dataclass(frozen=True)
class Cut:
    """How a matrix [M, N] of every rank is cut. rows, columns: of a tile; of_all: it goes to every rank."""

    M: int
    N: int
    ranks: int
    rows: int
    columns: int
    to_all: bool

    @property
    def block(self) -> int:
        return self.M if self.to_all else num_tiles(self.M, self.ranks)

    @property
    def tiles(self) -> int:
        """Of a block."""
        return num_tiles(self.block, self.rows) * num_tiles(self.N, self.columns)

    @property
    def flags(self) -> int:
        """In a segment: of every rank's tiles, and of every owner's results."""
        return self.ranks * self.tiles * (1 if self.to_all else 2)

    @property
    def elements(self) -> int:
        """In a half: every rank's block, and the results after them."""
        return self.ranks * self.block * self.N

    def results_at(self, dtype: torch.dtype) -> int:
        """Bytes from the beginning of a half to the results."""
        return aligned(self.elements * dtype.itemsize)

    def half(self, dtype: torch.dtype) -> int:
        """Bytes of data that a use needs. A block's results are as many as its rows."""
        return self.results_at(dtype) * (1 if self.to_all else 2)

    def call(self, dtype: torch.dtype) -> str:
        """What all ranks' calls have in common."""
        to = "all" if self.to_all else "its owners"
        return f"[{self.M}, {self.N}] {dtype} to {to} in tiles of [{self.rows}, {self.columns}]"

    def rows_of(self, rank: int) -> int:
        """Rows of the matrix in a rank's block."""
        return self.M if self.to_all else max(0, min(self.block, self.M - rank * self.block))


def push(use: Use, x: Tensor, cut: Cut, width: int | None = None, programs: int = MOVERS) -> Launch:
    """x, its columns together, to all or to the owners; a flag for every `width` columns."""
    width = width or cut.columns
    tiles = num_tiles(cut.M, cut.rows) * num_tiles(cut.N, width) + cut.ranks
    arguments = use.arguments() | {
        "x": x, "data_at": use.data_at, "M": cut.M, "N": cut.N, "x_stride": x.stride(0), "block": cut.block,
        "width": width, "TO_ALL": cut.to_all, "ROWS": cut.rows, "COLUMNS": cut.columns,
    }  # fmt: skip
    registers = PUSH_REGISTERS if use.memory.arch.startswith("sm_") else None
    return Launch(push_kernel, (min(programs, tiles),), arguments, PUSH_WARPS, 2, registers)


def reduce(use: Use, out: Tensor | None, dtype: torch.dtype, cut: Cut, programs: int = MOVERS) -> Launch:
    """The sums of this rank's block, to `out` or, where that is None, to the results of every rank."""
    rows = cut.rows_of(use.memory.rank)
    arguments = use.arguments() | {
        "data": use.own_data(dtype, cut.elements), "out": out, "results_at": use.data_at + cut.results_at(dtype),
        "M": rows, "N": cut.N, "block": cut.block, "SHARE": out is None, "ROWS": cut.rows, "COLUMNS": cut.columns,
    }  # fmt: skip
    return Launch(reduce_kernel, (max(1, min(programs, cut.tiles)),), arguments, 4, 2)


def collect(use: Use, out: Tensor, cut: Cut, programs: int = MOVERS) -> Launch:
    """The results of every owner to `out`."""
    arguments = use.arguments() | {
        "results": use.own_data(out.dtype, cut.elements, cut.results_at(out.dtype)), "out": out,
        "M": cut.M, "N": cut.N, "block": cut.block, "ROWS": cut.rows, "COLUMNS": cut.columns,
    }  # fmt: skip
    return Launch(collect_kernel, (min(programs, cut.ranks * cut.tiles),), arguments, 4, 2)


def start_sums(use: Use, out: Tensor, cut: Cut, programs: int = MOVERS) -> Callable[[], Tensor]:
    """Begin to add up what all ranks push in this use; the result, called when `out` is needed, waits for it.

    out: of this rank's block [rows, N], or, if the tiles went to owners and it has M rows, of the whole matrix. It was
    allocated before the use began.
    """
    memory, whole = use.memory, not cut.to_all and len(out) == cut.M

    def launch() -> None:
        with memory.aside():
            reduce(use, None if whole else out, out.dtype, cut, programs).run()
            if whole:
                collect(use, out, cut, programs).run()

    def finish() -> Tensor:
        if not memory.has_aside:
            launch()
        use.finish()
        return out

    if memory.has_aside:
        launch()
    return finish


# ----------------------------------------------------------------------------------------------------------- all-reduce


def all_reduce(x: Tensor, memory: SymmetricMemory, to_all: bool | None = None) -> Tensor:
    """The sum of x [M, N] over all ranks, the same bits on each. Source: vLLM's and kraken's one-shot and two-shot.

    x: fp32, bf16 or fp16, the same shape on every rank. to_all: every rank sums everything (one-shot); else every rank
    sums a block of rows and sends the sums to all (two-shot); default: by a table.
    Raises ValueError for other tensors, PeersDiffer, and PeerTimeout.
    """
    if x.dim() != 2 or x.dtype not in DTYPES:
        raise ValueError(f"x {list(x.shape)} {x.dtype}: need [M, N] in fp32, bf16 or fp16")
    if not x.numel():
        memory.pass_over("all_reduce")
        return x.clone()
    x = x.contiguous()
    to_all = is_small(x.numel() * x.element_size(), memory.ranks) if to_all is None else to_all
    cut = Cut(len(x), x.shape[1], memory.ranks, 16, 256, to_all)
    out = torch.empty_like(x)
    use = memory.use("all_reduce", cut.flags, cut.half(x.dtype), cut.call(x.dtype))
    programs = memory.processors
    push(use, x, cut, programs=programs).run()
    return start_sums(use, out, cut, programs)()


# ----------------------------------------------------------------------------------------------------------- inspection


def aot_specs(arch: str) -> dict[str, Launch]:
    """The launches by name for 4096 tokens of Llama-8B on 8 ranks, on tensors without storage."""
    specs = {}
    with torch.device("meta"):
        x = torch.empty(4096, LLAMA.hidden, dtype=LLAMA.torch_dtype)
    for way, to_all in (("to_all", True), ("to_owner", False)):
        cut = Cut(len(x), x.shape[1], 8, 16, 256, to_all)
        use = described_use(arch, 8, cut.flags, cut.half(x.dtype))
        specs[f"push_{way}"] = push(use, x, cut)
        specs[f"reduce_{way}"] = reduce(use, x if to_all else None, x.dtype, cut)
    specs["collect"] = collect(use, x, cut)
    return specs


KERNEL = Kernel("comm.exchange", torch=False, specs=aot_specs, place=9)
