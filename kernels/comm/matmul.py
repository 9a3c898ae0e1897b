"""Matmuls fused with their collective, over symmetric memory. The loop over K is that of `kernels/_tiles.py`.

| operation               | launches                                                                                |
|-------------------------|-----------------------------------------------------------------------------------------|
| `matmul_all_reduce`     | product, each tile pushed to its owner (small: to all) when it is done; beside it, sums |
| `matmul_reduce_scatter` | the same, to owners                                                                     |
| `all_gather_matmul`     | rows pushed to all; beside it, product of the rows that are there                       |

Tiles go in an order rotated by rank: products begin with the next rank's rows and end with the own, so that links are
used evenly; a gathered product begins with the own rows, which are there first. Products wait for nobody, and sums run
beside them on processors of their own, so no order of programs can make ranks wait in a circle.

Shapes are per rank. Ranks call the same operations in the same order, on one dtype and the same shapes but where it
says otherwise; else PeersDiffer or PeerTimeout is raised. Shape letters: R ranks, T tokens of all ranks, t = T / R, K
summed, N columns. Operations raise ValueError for tensors that don't fit each other.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megapar.kernels._common import (
    INTERPRETED,
    Launch,
    cast,
    cdiv,
    device_function,
    next_power_of_2,
    num_tiles,
    precision,
    relative,
    tl,
    triton,
)
from megapar.kernels._tiles import quarters_of, tile_at, tile_product
from megapar.kernels.comm.exchange import (
    DTYPES,
    MOVERS,
    PUSH_REGISTERS,
    PUSH_WARPS,
    Cut,
    is_small,
    push,
    start_sums,
    store_to,
)
from megapar.kernels.comm.symmetric import SymmetricMemory, Use, await_flag, begin, described_use, post, unless
from megapar.kernels.matmul import (
    CONFIGS,
    GROUP,
    PROCESSORS,
    Config,
    config_of,
    tma_tiles,
    with_lines_together,
)
from megapar.kernels.registry import Kernel
from megapar.kernels.shapes import DEMO, LLAMA

# Of one of NVIDIA's processors: registers, and bytes of shared memory by architecture (of sm_80's smallest relatives),
# of which every program takes some for the system (CUDA C++ Programming Guide, "Compute Capabilities").
REGISTERS, SHARED, RESERVED = 1 << 16, {"sm_80": 100 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10}, 1 << 10
# Bytes of a tile that `push_rows` has in registers: 64 of each thread. The interpreter pays for every tile.
PUSHED = 1 << 17 if INTERPRETED else 1 << 13


def _flops_and_bytes(grid: Any, kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
    """What a profiler is told. Bytes: operands, and what is written here or to peers."""
    a, b = args["a"], args["b"]
    rows = args["M"] * (args["RANKS"] if "out" in args else 1)
    copies = args["RANKS"] if args.get("TO_ALL") else 1
    moved = rows * a.shape[1] + b.numel() + rows * args["N"] * copies
    return {
        "name": kernel.name,
        f"flops{8 * a.element_size()}": 2 * rows * args["N"] * args["K"],
        "bytes": moved * a.element_size(),
    }


@device_function
def send_product(
    table, peer, data_at, product, row, column, N, end,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, QUARTERS: tl.constexpr,
):  # fmt: skip
    """A tile, in fp32, to row `row` of a peer's half, its rows before `end` only."""
    if QUARTERS:
        quarters = quarters_of(product, ROWS, COLUMNS)
        for part in tl.static_range(4):
            store_to(
                table, peer, data_at, cast(quarters[part], DTYPE), row, column + part * (COLUMNS // 4), N, end,
                DTYPE, ROWS, COLUMNS // 4,
            )  # fmt: skip
    else:
        store_to(table, peer, data_at, cast(product, DTYPE), row, column, N, end, DTYPE, ROWS, COLUMNS)


@triton.jit(launch_metadata=_flops_and_bytes, do_not_specialize=["mark", "flags_at", "data_at", "rank", "M", "block"])
def product_push_kernel(
    a, b, a_tiles, b_tiles, table, begun, flags, error, rank, mark, operation, limit, flags_at, data_at,
    M, N, K, block, a_stride, b_stride, RANKS: tl.constexpr, TO_ALL: tl.constexpr,
    A_BY_ROW: tl.constexpr, B_BY_ROW: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr, QUARTERS: tl.constexpr,
):  # fmt: skip
    """Tiles of a @ b [M, N] to the owners of their rows, or to all. Grid: any number of programs."""
    begin(table, begun, mark, error, rank, operation, limit, RANKS)
    blocks = cdiv(M, block)
    of_block = cdiv(block, ROWS) * cdiv(N, COLUMNS)
    for number in range(tl.program_id(0), unless(error, blocks * of_block), tl.num_programs(0)):
        owner = (number // of_block + rank + 1) % blocks
        row, column = tile_at(number % of_block, block, N, ROWS, COLUMNS, GROUP)
        end = tl.minimum(block, M - owner * block)
        product = tile_product(
            a, b, a_tiles, b_tiles, owner * block + row, column, owner * block + end, N, K, a_stride, b_stride,
            A_BY_ROW, B_BY_ROW, PRECISION, ROWS, COLUMNS, STEP,
        )  # fmt: skip
        for peer in range(0 if TO_ALL else owner, RANKS if TO_ALL else owner + 1):
            send_product(
                table, peer, data_at, product, rank * block + row, column, N, rank * block + end,
                a.dtype.element_ty, ROWS, COLUMNS, QUARTERS,
            )  # fmt: skip
        tl.debug_barrier()
        flag = rank * of_block + row // ROWS * cdiv(N, COLUMNS) + column // COLUMNS
        for peer in range(0 if TO_ALL else owner, RANKS if TO_ALL else owner + 1):
            post(table, peer, flags_at, flag, mark)


@triton.jit(launch_metadata=_flops_and_bytes, do_not_specialize=["mark", "flags_at", "rank", "M"])
def gathered_product_kernel(
    a, b, out, a_tiles, b_tiles, table, begun, flags, error, rank, mark, operation, limit, flags_at,
    M, N, K, b_stride, RANKS: tl.constexpr, B_BY_ROW: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr, QUARTERS: tl.constexpr,
):  # fmt: skip
    """out [R * M, N] from a [R * M, K] in this rank's half, M rows of every rank, as they come. Grid: any number.

    The loop over tiles is not flattened into the one over K: loads of the next tile would then begin before its flag
    has been read.
    """
    of_rank = cdiv(M, ROWS) * cdiv(N, COLUMNS)
    for number in range(tl.program_id(0), RANKS * of_rank, tl.num_programs(0)):
        peer = (number // of_rank + rank) % RANKS
        row, column = tile_at(number % of_rank, M, N, ROWS, COLUMNS, GROUP)
        await_flag(
            flags + peer * cdiv(M, ROWS) + row // ROWS, mark, error, rank, peer, operation, limit
        )  # fmt: skip
        if a_tiles is not None:
            fence_tma()
        first, end = peer * M + row, (peer + 1) * M
        product = tile_product(
            a, b, a_tiles, b_tiles, first, column, end, N, K, K, b_stride,
            True, B_BY_ROW, PRECISION, ROWS, COLUMNS, STEP,
        )  # fmt: skip
        if QUARTERS:
            quarters = quarters_of(product, ROWS, COLUMNS)
            for part in tl.static_range(4):
                store_rows(out, quarters[part], first, column + part * (COLUMNS // 4), end, N, ROWS, COLUMNS // 4)
        else:
            store_rows(out, product, first, column, end, N, ROWS, COLUMNS)


@device_function
def fence_tma():
    """What is read by TMA from here on sees what was written by ordinary stores and is visible to this thread."""
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            "fence.proxy.async.global; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )


@device_function
def store_rows(out, part, row, column, end, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows of a part of a tile that are before `end`: a tile of TMA could overwrite the next rank's."""
    rows, columns = row + tl.arange(0, ROWS)[:, None], column + tl.arange(0, COLUMNS)[None, :]
    into = out + rows.to(tl.int64) * N + columns
    tl.store(into, cast(part, out.dtype.element_ty), mask=(rows < end) & (columns < N))


# ------------------------------------------------------------------------------------------------------------- launches


def config_for(arch: str, dtype: torch.dtype, M: int, N: int, processors: int) -> Config:
    """Tiles of a product [M, N]. sm_80's largest leaves no registers for peers' addresses: 12 bytes were spilled."""
    config = config_of(arch, dtype, M, N, processors)
    return CONFIGS["sm_80", 2][1] if config == CONFIGS["sm_80", 2][0] else config


def room_beside_push(arch: str, config: Config, dtype: torch.dtype) -> int | None:
    """The most registers that a thread of a gathered product may have; None: no limit of ours.

    Its programs wait on their processors for flags that only `push` posts, which is launched beside them. They must
    leave room for it on the processor, or nobody gets on. Raises ValueError where shared memory does not suffice.
    """
    if not arch.startswith("sm_"):
        return None
    shared = config.stages * config.step * (config.rows + config.columns) * dtype.itemsize
    if shared + 2 * RESERVED > SHARED[relative(arch) if arch not in SHARED else arch]:
        raise ValueError(
            f"{config} of {dtype} takes {shared >> 10} KB of shared memory on {arch} and leaves no room for the kernel "
            "that it waits for; use fewer stages"
        )
    return min(255, (REGISTERS - 32 * PUSH_WARPS * PUSH_REGISTERS) // (32 * config.warps) // 8 * 8)


def push_product(use: Use, a: Tensor, b: Tensor, cut: Cut, config: Config, processors: int) -> Launch:
    """Tiles of a @ b to all or to the owners."""
    a, b = with_lines_together(a), with_lines_together(b)
    a_by_row, b_by_row = a.stride(1) == 1, b.stride(1) == 1
    arguments = use.arguments() | {
        "a": a, "b": b,
        "a_tiles": tma_tiles(config, a, config.rows, config.step),
        "b_tiles": tma_tiles(config, b, config.step, config.columns),
        "data_at": use.data_at, "M": cut.M, "N": cut.N, "K": a.shape[1], "block": cut.block,
        "a_stride": a.stride(0 if a_by_row else 1), "b_stride": b.stride(0 if b_by_row else 1), "TO_ALL": cut.to_all,
        "A_BY_ROW": a_by_row, "B_BY_ROW": b_by_row, "PRECISION": precision(use.memory.arch),
        "ROWS": config.rows, "COLUMNS": config.columns, "STEP": config.step, "GROUP": GROUP,
        "QUARTERS": config.quarters,
    }  # fmt: skip
    tiles = cut.tiles * (1 if cut.to_all else cut.ranks)
    return Launch(
        product_push_kernel, (max(1, min(tiles, processors - MOVERS)),), arguments, config.warps, config.stages
    )


def push_rows(use: Use, x: Tensor, config: Config) -> Launch:
    """x [t, K] to all, a flag for as many rows as a tile of the product has."""
    columns = min(next_power_of_2(x.shape[1]), max(16, PUSHED // (config.rows * x.element_size())))
    return push(use, x, Cut(len(x), x.shape[1], use.memory.ranks, config.rows, columns, True), width=x.shape[1])


def gathered_product(use: Use, gathered: Tensor, b: Tensor, out: Tensor, config: Config, processors: int) -> Launch:
    """out = gathered @ b, from this rank's half, as the rows come."""
    b, ranks = with_lines_together(b), use.memory.ranks
    t, b_by_row = len(gathered) // ranks, b.stride(1) == 1
    arguments = use.arguments() | {
        "a": gathered, "b": b, "out": out,
        "a_tiles": tma_tiles(config, gathered, config.rows, config.step),
        "b_tiles": tma_tiles(config, b, config.step, config.columns),
        "M": t, "N": b.shape[1], "K": gathered.shape[1], "b_stride": b.stride(0 if b_by_row else 1),
        "B_BY_ROW": b_by_row, "PRECISION": precision(use.memory.arch),
        "ROWS": config.rows, "COLUMNS": config.columns, "STEP": config.step, "GROUP": GROUP,
        "QUARTERS": config.quarters,
    }  # fmt: skip
    tiles = ranks * num_tiles(t, config.rows) * num_tiles(b.shape[1], config.columns)
    programs = max(1, min(tiles, processors - MOVERS))
    registers = room_beside_push(use.memory.arch, config, b.dtype)
    return Launch(gathered_product_kernel, (programs,), arguments, config.warps, config.stages, registers)


# ----------------------------------------------------------------------------------------------------------- operations


def _check(x: Tensor, w: Tensor) -> None:
    fits = x.dim() == w.dim() == 2 and x.shape[1] == len(w) and x.dtype == w.dtype
    if not fits or x.dtype not in DTYPES:
        shapes = f"x {list(x.shape)} {x.dtype}, w {list(w.shape)} {w.dtype}"
        raise ValueError(f"{shapes}: need [T, K] and [K, N] of one dtype, fp32, bf16 or fp16")


def start_matmul_all_reduce(
    x: Tensor, w: Tensor, memory: SymmetricMemory, to_all: bool | None = None
) -> Callable[[], Tensor]:
    """Begin the sum over ranks of x [T, K] @ w [K, N]; the result returns it, [T, N], the same bits on every rank.

    K may differ between ranks, T and N not. Partial products are rounded to the dtype of x, as they are when a matmul
    and a collective are apart, and added in fp32. to_all: every rank sums everything; else its block, and sends it to
    all; default: by a table.
    """
    _check(x, w)
    T, N = len(x), w.shape[1]
    if not T * N:
        memory.pass_over("matmul_all_reduce")
        return lambda: x.new_empty(T, N)
    to_all = is_small(T * N * x.element_size(), memory.ranks) if to_all is None else to_all
    config = config_for(memory.arch, x.dtype, T, N, memory.processors)
    cut = Cut(T, N, memory.ranks, config.rows, config.columns, to_all)
    out = x.new_empty(T, N)
    use = memory.use("matmul_all_reduce", cut.flags, cut.half(x.dtype), cut.call(x.dtype))
    push_product(use, x, w, cut, config, memory.processors).run()
    return start_sums(use, out, cut)


def start_matmul_reduce_scatter(x: Tensor, w: Tensor, memory: SymmetricMemory) -> Callable[[], Tensor]:
    """Begin this rank's rows of the sum over ranks of x [T, K] @ w [K, N]; the result returns them, [t, N].

    As `start_matmul_all_reduce`. R divides T.
    """
    _check(x, w)
    T, N = len(x), w.shape[1]
    if T % memory.ranks:
        raise ValueError(f"{T} rows over {memory.ranks} ranks: need a multiple")
    if not T * N:
        memory.pass_over("matmul_reduce_scatter")
        return lambda: x.new_empty(T // memory.ranks, N)
    config = config_for(memory.arch, x.dtype, T, N, memory.processors)
    cut = Cut(T, N, memory.ranks, config.rows, config.columns, False)
    out = x.new_empty(T // memory.ranks, N)
    use = memory.use("matmul_reduce_scatter", cut.flags, cut.half(x.dtype), cut.call(x.dtype))
    push_product(use, x, w, cut, config, memory.processors).run()
    return start_sums(use, out, cut)


def all_gather_matmul(x: Tensor, w: Tensor, memory: SymmetricMemory) -> tuple[Tensor, Tensor]:
    """(gathered x @ w [T, N], gathered x [T, K]) of x [t, K] and w [K, N].

    N may differ between ranks, t and K not. A rank without columns has nothing to wait for: it does not gather, and
    gets zeros, which nobody reads, in gathered x's place.
    """
    _check(x, w)
    (t, K), N, ranks = x.shape, w.shape[1], memory.ranks
    if not t * K:
        memory.pass_over("all_gather_matmul")
        return x.new_zeros(ranks * t, N), x.new_empty(ranks * t, K)
    x = x.contiguous()
    config = config_for(memory.arch, x.dtype, ranks * t, K, memory.processors)  # K, not N: the same on all ranks
    stripes = Cut(t, K, ranks, config.rows, K, True)
    use = memory.use("all_gather_matmul", stripes.flags, stripes.half(x.dtype), stripes.call(x.dtype))
    with memory.aside():
        push_rows(use, x, config).run()
    half = use.own_data(x.dtype, stripes.elements).view(ranks * t, K)
    out = x.new_empty(ranks * t, N)
    gathered = x.new_zeros(1, 1).expand(ranks * t, K)
    if N:
        gathered_product(use, half, w, out, config, memory.processors).run()
        gathered = half.clone()
    use.finish()
    return out, gathered


# ----------------------------------------------------------------------------------------------------------- inspection


def aot_specs(arch: str) -> dict[str, Launch]:
    """The launches by name for the MLP of Llama-8B on 8 ranks and that of the demo on 2, on tensors without storage."""
    specs = {}
    for tokens, sizes, ranks in ((4096, LLAMA, 2), (4096, LLAMA, 8), (256, DEMO, 2)):
        hidden, width, dtype = sizes.hidden, sizes.ffn // ranks, sizes.torch_dtype
        with torch.device("meta"):
            x, y = torch.empty(tokens, hidden, dtype=dtype), torch.empty(tokens, width, dtype=dtype)
            up, down = torch.empty(width, hidden, dtype=dtype), torch.empty(hidden, width, dtype=dtype)
        for way, to_all in (("to_all", True), ("to_owner", False)):
            config = config_for(arch, dtype, tokens, hidden, PROCESSORS[arch])
            cut = Cut(tokens, hidden, ranks, config.rows, config.columns, to_all)
            use = described_use(arch, ranks, cut.flags, cut.half(dtype))
            specs[f"product_push_{way}_{width}"] = push_product(use, y, down.t(), cut, config, PROCESSORS[arch])
        specs[f"push_rows_{width}"] = push_rows(use, x[: tokens // ranks], config)
        specs[f"gathered_product_{width}"] = gathered_product(use, x, up.t(), y, config, PROCESSORS[arch])
    return specs


KERNEL = Kernel("comm.matmul", torch=False, specs=aot_specs, place=10)
