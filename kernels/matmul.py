"""Matrix product with an epilogue: out = activation(a @ b + bias) + residual. What fused collectives are built from.

A fixed number of programs goes over the tiles of the output. Where strides allow, tiles are read and written by TMA;
the compiler overlaps the epilogue of a tile with the first loads of the next. Every output is one program's sum in the
order of K: the same bits every time.

Shape letters: M rows, K summed, N columns.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megapar.kernels import backend_of
from megapar.kernels._common import (
    Launch,
    TensorDescriptor,
    aligned_matrix,
    cast,
    cdiv,
    device_function,
    num_tiles,
    overlaps_itself,
    precision,
    relative,
    rows_of,
    share_memory,
    target_arch,
    tiles_of,
    tl,
    triton,
    wide_dtype,
)
from megapar.kernels._counters import APART, counter_of, next_tile, put_back
from megapar.kernels._operators import call, custom_op
from megapar.kernels._tiles import load_block, quarters_of, tile_at, tile_product
from megapar.kernels.registry import Kernel
from megapar.kernels.shapes import GPT2, MODELS

ACTIVATIONS = {
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def matmul(
    a: Tensor, b: Tensor, *, bias: Tensor | None = None, activation: str | None = None,
    residual: Tensor | None = None, out: Tensor | None = None, aligned: bool = False,
) -> Tensor:  # fmt: skip
    """activation(a @ b + bias) + residual: a [M, K], b [K, N], bias [N], residual [M, N] -> [M, N].

    One floating dtype; a and b may be transposed views. Sums and the epilogue are in fp32 (fp64 for fp64), rounded
    once in Triton; torch rounds after each operation. out: where the result is written, in the same dtype, its rows
    together in memory; it is returned then. It shares none with the inputs, but it may be the residual. aligned: in
    Triton's form a result's rows may lie apart, see `aligned_matrix`. activation: gelu (tanh form), relu or silu. Not
    differentiable: gradients are products too, `matmul(dy, b.t())` and `add_matmul(into, a.t(), dy)`. Raises ValueError
    for other shapes and dtypes.
    """
    _check(a, b, bias=bias, residual=residual, out=out)
    if out is not None and out.numel() and 1 not in (out.stride(1), out.shape[1]):
        raise ValueError(f"out {list(out.shape)} with strides {out.stride()}: need rows that lie together")
    if out is not None:
        _refuse_overlap("out", out, a=a, b=b, bias=bias, residual=residual)
    if activation not in (None, *ACTIVATIONS):
        raise ValueError(f"activation={activation}: use one of {', '.join(ACTIVATIONS)}")
    if backend_of("matmul", a.device.type, a.dtype) != "torch":
        if out is None:
            return call(matmul_op, a, b, bias, activation, residual, aligned)
        call(matmul_into_op, out, a, b, bias, activation, residual)
        return out
    if bias is None and activation is None and residual is None:
        return torch.mm(a, b, out=out)
    y = a @ b if bias is None else torch.addmm(bias, a, b)
    if activation is not None:
        y = ACTIVATIONS[activation](y)
    y = y if residual is None else y + residual
    return y if out is None else out.copy_(y)


def empty_matrix(x: Tensor, rows: int, columns: int) -> Tensor:
    """For a product of matrices like x, which no collective takes: in Triton's form an `aligned_matrix`."""
    plain = backend_of("matmul", x.device.type, x.dtype) == "torch"
    return x.new_empty(rows, columns) if plain else aligned_matrix(x, rows, columns)


def add_matmul(into: Tensor, a: Tensor, b: Tensor, *, accumulate: bool = True) -> None:
    """into += a @ b, in place: into [M, N] in the inputs' dtype or in fp32, its rows or its columns together in memory
    and apart from the inputs. Raises ValueError for others. accumulate: False writes a @ b, and nothing is read.

    Into fp32 Triton rounds nothing on the way. torch rounds the product of 16-bit matrices to their dtype before it is
    added: on a CPU with instructions for bf16 their product in fp32 takes twice the time.
    """
    _check(a, b, into=into)
    if into.numel() and 1 not in (*into.stride(), *into.shape):
        raise ValueError(
            f"into {list(into.shape)} with strides {into.stride()}: need rows or columns that lie together"
        )
    _refuse_overlap("into", into, a=a, b=b)
    if backend_of("matmul", a.device.type, a.dtype) != "torch":
        call(add_matmul_op, into, a, b, accumulate)
    elif into.dtype == a.dtype:
        if accumulate:
            into.addmm_(a, b)
        else:
            torch.mm(a, b, out=into)
    elif accumulate:
        into.add_(a @ b)
    else:
        into.copy_(a @ b)


def _check(a: Tensor, b: Tensor, **others: Tensor | None) -> None:
    fits = a.dim() == b.dim() == 2 and a.shape[1] == b.shape[0] and a.dtype == b.dtype
    if not fits or not a.is_floating_point():
        raise ValueError(f"{_shapes(a, b)}: need [M, K] and [K, N] of one floating dtype")
    shape = (len(a), b.shape[1])
    for name, tensor in others.items():
        if tensor is None:
            continue
        needed = shape[1:] if name == "bias" else shape
        dtypes = (a.dtype, wide_dtype(a)) if name == "into" else (a.dtype,)
        if tensor.shape != needed or tensor.dtype not in dtypes:
            raise ValueError(
                f"{name} {list(tensor.shape)} {tensor.dtype} with {_shapes(a, b)}: need {list(needed)} in "
                + " or ".join(sorted({str(dtype) for dtype in dtypes}))
            )


def _shapes(a: Tensor, b: Tensor) -> str:
    return f"a {list(a.shape)} {a.dtype}, b {list(b.shape)} {b.dtype}"


def _refuse_overlap(name: str, out: Tensor, **inputs: Tensor | None) -> None:
    if overlaps_itself(out):
        raise ValueError(f"{name} {list(out.shape)} with strides {out.stride()}: need memory for every element")
    if torch.compiler.is_compiling() or out.is_meta:
        return
    for other, x in inputs.items():
        if x is None or not (x.numel() and out.numel()):
            continue
        in_place = other == "residual" and (x.data_ptr(), x.stride()) == (out.data_ptr(), out.stride())
        if not in_place and share_memory(out, x):
            raise ValueError(f"{name} shares memory with {other}: give it memory of its own")


# -------------------------------------------------------------------------------------------------------------- kernels


@device_function
def finish(
    product, bias, residual, residual_stride, row, column, M, N,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The epilogue of a tile, in fp32."""
    if bias is not None:
        product += load_block(bias, 0, column, 0, 1, N, 1, COLUMNS).to(tl.float32)
    if ACTIVATION == "gelu":  # x * sigmoid(2u) is x * (1 + tanh(u)) / 2
        u = 0.7978845608028654 * (product + 0.044715 * product * product * product)
        product = product / (1.0 + tl.exp(-2.0 * u))
    elif ACTIVATION == "silu":
        product = product / (1.0 + tl.exp(-product))
    elif ACTIVATION == "relu":
        product = tl.maximum(product, 0.0)
    if residual is not None:
        product += load_block(residual, row, column, residual_stride, M, N, ROWS, COLUMNS).to(tl.float32)
    return product


def _flops_and_bytes(grid: Any, kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
    tensors = [args[name] for name in ("a", "b", "bias", "residual", "out") if args[name] is not None]
    moved = sum(x.numel() * x.element_size() for x in tensors)
    return {
        "name": kernel.name,
        f"flops{8 * args['a'].element_size()}": 2 * args["M"] * args["N"] * args["K"],
        "bytes": moved,
    }


@device_function
def store_finished(
    out, out_tiles, product, bias, residual, row, column, M, N, out_stride, residual_stride,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The epilogue of a part of a tile, and its store in out's dtype."""
    part = finish(product, bias, residual, residual_stride, row, column, M, N, ACTIVATION, ROWS, COLUMNS)
    part = cast(part, out.dtype.element_ty)
    if out_tiles is not None:
        out_tiles.store([row, column], part)
    else:
        rows, columns = row + tl.arange(0, ROWS)[:, None], column + tl.arange(0, COLUMNS)[None, :]
        tl.store(out + rows.to(tl.int64) * out_stride + columns, part, mask=(rows < M) & (columns < N))


@device_function
def compute_tile(
    number, a, b, out, bias, residual, a_tiles, b_tiles, out_tiles, M, N, K, a_stride, b_stride, out_stride,
    residual_stride, A_BY_ROW: tl.constexpr, B_BY_ROW: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
    QUARTERS: tl.constexpr,
):  # fmt: skip
    """The tile of this number, from its operands to out."""
    row, column = tile_at(number, M, N, ROWS, COLUMNS, GROUP)
    product = tile_product(
        a, b, a_tiles, b_tiles, row, column, M, N, K, a_stride, b_stride,
        A_BY_ROW, B_BY_ROW, PRECISION, ROWS, COLUMNS, STEP,
    )  # fmt: skip
    if QUARTERS:
        quarters = quarters_of(product, ROWS, COLUMNS)
        for part in tl.static_range(4):
            store_finished(
                out, out_tiles, quarters[part], bias, residual, row, column + part * (COLUMNS // 4), M, N,
                out_stride, residual_stride, ACTIVATION, ROWS, COLUMNS // 4,
            )  # fmt: skip
    else:
        store_finished(
            out, out_tiles, product, bias, residual, row, column, M, N,
            out_stride, residual_stride, ACTIVATION, ROWS, COLUMNS,
        )  # fmt: skip


@triton.jit(launch_metadata=_flops_and_bytes, do_not_specialize=["M"])
def matmul_kernel(
    a, b, out, bias, residual, counter, a_tiles, b_tiles, out_tiles, M, N, K, a_stride, b_stride, out_stride,
    residual_stride, A_BY_ROW: tl.constexpr, B_BY_ROW: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
    QUARTERS: tl.constexpr,
):  # fmt: skip
    """out [M, N]. residual may be out itself. Grid: any number of programs.

    counter: at 0, before and after; programs take their tiles from it. None: in steps of the number of programs.
    """
    tiles = cdiv(M, ROWS) * cdiv(N, COLUMNS)
    if counter is not None:
        number = next_tile(counter)
        while number < tiles:
            compute_tile(
                number, a, b, out, bias, residual, a_tiles, b_tiles, out_tiles, M, N, K, a_stride, b_stride,
                out_stride, residual_stride, A_BY_ROW, B_BY_ROW, ACTIVATION, PRECISION, ROWS, COLUMNS, STEP, GROUP,
                QUARTERS,
            )  # fmt: skip
            number = next_tile(counter)
        put_back(counter, number, tiles)
    else:
        for number in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            compute_tile(
                number, a, b, out, bias, residual, a_tiles, b_tiles, out_tiles, M, N, K, a_stride, b_stride,
                out_stride, residual_stride, A_BY_ROW, B_BY_ROW, ACTIVATION, PRECISION, ROWS, COLUMNS, STEP, GROUP,
                QUARTERS,
            )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- launches


@dataclass(frozen=True)
class Config:
    """Tile of the output [rows, columns], elements of K in a step of the loop, and the launch.

    quarters: the epilogue goes over a quarter of a tile's columns at a time, which saves shared memory on NVIDIA's
    and costs it on AMD's.
    source: whose clock chose it; "": nobody's, but what the compiler makes of it. experiments/gpu/tune.py writes it
    """

    rows: int
    columns: int
    step: int
    warps: int
    stages: int
    tma: bool = False
    quarters: bool = True
    source: str = field(default="", compare=False)


# (architecture, bytes of an element) -> from the largest tile to the smallest; docs/kernels.md has the figures that
# chose them. sm_80's fit into the 99 KB of its smaller relatives.
CONFIGS = {
    ("sm_80", 2): (Config(128, 256, 32, 8, 4), Config(128, 128, 64, 8, 3), Config(64, 64, 64, 4, 4)),
    ("sm_80", 4): (Config(64, 64, 32, 4, 3),),
    ("sm_90", 2): (
        Config(128, 256, 64, 8, 3, tma=True),
        Config(128, 128, 64, 8, 4, tma=True),
        Config(64, 128, 64, 4, 4, tma=True),
    ),
    ("sm_90", 4): (Config(64, 64, 32, 4, 3),),
    ("sm_100", 2): (
        Config(128, 256, 64, 8, 3, tma=True),
        Config(128, 128, 64, 8, 4, tma=True),
        Config(64, 128, 64, 4, 4, tma=True),
    ),
    ("sm_100", 4): (Config(64, 64, 32, 4, 3),),
    ("gfx942", 2): (Config(128, 128, 64, 8, 2, quarters=False), Config(64, 64, 64, 4, 2, quarters=False)),
    ("gfx942", 4): (Config(64, 64, 32, 4, 2, quarters=False),),
    ("interpret", 2): (Config(128, 128, 128, 4, 1, tma=True), Config(64, 64, 128, 4, 1, tma=True)),
    ("interpret", 4): (Config(128, 128, 128, 4, 1, quarters=False), Config(64, 64, 128, 4, 1, quarters=False)),
}
PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304, "interpret": 3}
GROUP = 8


def config_of(arch: str, dtype: torch.dtype, M: int, N: int, processors: int) -> Config:
    """The largest tile that gives every processor one, or else the smallest."""
    choices = CONFIGS[arch if (arch, 2) in CONFIGS else relative(arch), dtype.itemsize]
    full = (c for c in choices if num_tiles(M, c.rows) * num_tiles(N, c.columns) >= processors)
    return next(full, choices[-1])


def launch(
    arch: str, a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None, activation: str | None = None,
    residual: Tensor | None = None, counter: Tensor | None = None,
) -> Launch:  # fmt: skip
    """out [M, N]: any matrix whose rows lie together. a, b: either way. counter: at 0, to hand out the tiles."""
    a, b = with_lines_together(a), with_lines_together(b)
    (M, K), N = a.shape, b.shape[1]
    processors = num_processors(arch, out)
    config = config_of(arch, a.dtype, M, N, processors)
    if counter is not None and config == CONFIGS["sm_80", 2][0]:  # with a counter it spilled 12 bytes
        config = CONFIGS["sm_80", 2][1]
    a_by_row, b_by_row = a.stride(1) == 1, b.stride(1) == 1
    arguments = {
        "a": a, "b": b, "out": out, "bias": bias, "residual": residual, "counter": counter,
        "a_tiles": tma_tiles(config, a, config.rows, config.step),
        "b_tiles": tma_tiles(config, b, config.step, config.columns),
        "out_tiles": tma_tiles(config, out, config.rows, config.columns // 4 if config.quarters else config.columns),
        "M": M, "N": N, "K": K,
        "a_stride": a.stride(0 if a_by_row else 1), "b_stride": b.stride(0 if b_by_row else 1),
        "out_stride": out.stride(0), "residual_stride": None if residual is None else residual.stride(0),
        "A_BY_ROW": a_by_row, "B_BY_ROW": b_by_row, "ACTIVATION": activation, "PRECISION": precision(arch),
        "ROWS": config.rows, "COLUMNS": config.columns, "STEP": config.step, "GROUP": GROUP,
        "QUARTERS": config.quarters,
    }  # fmt: skip
    tiles = num_tiles(M, config.rows) * num_tiles(N, config.columns)
    return Launch(matmul_kernel, (min(tiles, processors),), arguments, config.warps, config.stages)


def num_processors(arch: str, tensor: Tensor) -> int:
    """How many programs fill the GPU that holds a tensor."""
    if tensor.is_cuda:
        return torch.cuda.get_device_properties(tensor.device).multi_processor_count
    return PROCESSORS[arch]


def with_lines_together(x: Tensor) -> Tensor:
    """A matrix whose rows or columns lie together."""
    return x if 1 in x.stride() else rows_of(x)


def tma_tiles(config: Config, x: Tensor, rows: int, columns: int) -> "TensorDescriptor | None":
    if not config.tma:
        return None
    return tiles_of(x, rows, columns) if x.stride(1) == 1 else tiles_of(x.t(), columns, rows)


# ------------------------------------------------------------------------------------------------------------ operators


@custom_op("megapar::matmul")
def matmul_op(
    a: Tensor, b: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None, aligned: bool
) -> Tensor:
    """activation(a @ b + bias) + residual; arguments checked by `matmul`."""
    out = aligned_matrix(a, len(a), b.shape[1]) if aligned else a.new_empty(len(a), b.shape[1])
    _run(out, a, b, bias, activation, residual)
    return out


@custom_op("megapar::matmul_into", mutates_args=("out",))
def matmul_into_op(
    out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None
) -> None:
    """The same, written to `out`."""
    _run(out, a, b, bias, activation, residual)


def _run(
    out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None
) -> None:
    if not out.numel():
        return
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else rows_of(residual)
    launch(target_arch(), a, b, rows_of(out), bias, activation, residual, counter_of(out)).run()


@custom_op("megapar::add_matmul", mutates_args=("into",))
def add_matmul_op(into: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
    """into += a @ b, or = where it does not accumulate; arguments checked by `add_matmul`."""
    if 1 in (into.stride(1), into.shape[1]):
        _run(into, a, b, None, None, into if accumulate else None)
    else:
        _run(into.t(), b.t(), a.t(), None, None, into.t() if accumulate else None)


@matmul_op.register_fake
def _(a, b, bias, activation, residual, aligned):
    return aligned_matrix(a, len(a), b.shape[1]) if aligned else a.new_empty(len(a), b.shape[1])


# ----------------------------------------------------------------------------------------------------------- inspection


def aot_specs(arch: str) -> dict[str, Launch]:
    """The launches by name for 4096 tokens in GPT-2's head and the MLP of MODELS, on tensors without storage.

    That of GPT-2's output projection has so few outputs that it takes the smallest tile. dynamic: with a counter.
    """
    with torch.device("meta"):
        x, w = (torch.empty(rows, GPT2.hidden, dtype=GPT2.torch_dtype) for rows in (4096, GPT2.vocab))
        grad, logits = torch.empty(w.shape), aligned_matrix(x, len(x), len(w))
        counter = torch.empty(APART, dtype=torch.int32)
    specs = {f"matmul_logits_{GPT2.vocab}": launch(arch, x, w.t(), logits)}
    specs[f"matmul_logits_input_grad_{GPT2.vocab}"] = launch(arch, logits, w, x)
    specs[f"matmul_logits_weight_grad_{GPT2.vocab}"] = launch(arch, logits.t(), x, grad, residual=grad)
    for sizes in MODELS.values():
        hidden, width, dtype = sizes.hidden, sizes.ffn, sizes.torch_dtype
        with torch.device("meta"):
            x, y = torch.empty(4096, hidden, dtype=dtype), torch.empty(4096, width, dtype=dtype)
            w, bias = torch.empty(width, hidden, dtype=dtype), torch.empty(width, dtype=dtype)
            grad = torch.empty(width, hidden)
        for kind, given in (("matmul", None), ("matmul_dynamic", counter)):
            specs[f"{kind}_{width}"] = launch(arch, x, w.t(), y, counter=given)
            specs[f"{kind}_bias_gelu_{width}"] = launch(arch, x, w.t(), y, bias, "gelu", counter=given)
            specs[f"{kind}_input_grad_{width}"] = launch(arch, y, w, x, counter=given)
            specs[f"{kind}_weight_grad_{width}"] = launch(arch, y.t(), x, grad, residual=grad, counter=given)
    with torch.device("meta"):
        x, grad = torch.empty(4096, GPT2.hidden, dtype=GPT2.torch_dtype), torch.empty(GPT2.hidden, GPT2.hidden)
    return specs | {"matmul_weight_grad_768": launch(arch, x.t(), x, grad, residual=grad)}


KERNEL = Kernel("matmul", specs=aot_specs, place=7)
