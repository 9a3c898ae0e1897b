"""RMSNorm (Zhang & Sennrich 2019), if wanted of a sum: h = x + residual, y = h / rms(h) * weight.

Its gradients are functions of their own, because whoever owns the weight decides when the weight's is computed. All
move each byte once and are bound by memory; what is kept for them beside h is one number per row.

Shape letters: T tokens, H hidden.
"""

import torch
from torch import Tensor

from megapar.kernels import backend_of
from megapar.kernels._common import (
    INTERPRETED,
    Launch,
    cast,
    check_gradient,
    floating,
    next_power_of_2,
    num_tiles,
    row_tile,
    rows_of,
    tells,
    tl,
    triton,
    wide_dtype,
)
from megapar.kernels._operators import call, custom_op
from megapar.kernels.registry import Kernel
from megapar.kernels.shapes import DEMO, LLAMA

# Elements of a program's tile of whole rows, and of a warp's share: 128 bits for each thread, also of AMD's wider
# warps. The interpreter pays for every program.
TILE, WARP, MOST_WARPS = 1 << 16 if INTERPRETED else 2048, 512, 16
# The weight's gradient: rows of a partial sum, which decide how it is rounded; rows and columns loaded at once.
BLOCK_ROWS, STEP, COLUMNS = 128, 64 if INTERPRETED else 4, 512


def rmsnorm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(y [T, H], h [T, H], rstd [T]): y = h * rstd * weight, rstd = 1 / sqrt(mean(h^2) + eps), h = x + residual.

    x, residual [T, H], one floating dtype, which y and h have too; h is x itself without a residual. weight [H], any
    floating dtype. Statistics and products are in fp32, or fp64 for fp64; h is rounded before it is normalised.
    Not differentiable: see `rmsnorm_input_grad`, `rmsnorm_weight_grad`. Raises ValueError for other shapes.
    """
    _check(x, weight, residual)
    if backend_of("rmsnorm", x.device.type, x.dtype) != "torch":
        if residual is None:
            y, rstd = call(rmsnorm_op, x, weight, eps)
            return y, x, rstd
        return call(add_rmsnorm_op, x, residual, weight, eps)
    h = x if residual is None else x + residual
    wide = h.to(wide_dtype(h))
    rstd = torch.rsqrt(wide.square().mean(1, keepdim=True).add_(eps))
    return (wide * rstd).mul_(weight).to(h.dtype), h, rstd.squeeze(1)


def rmsnorm_input_grad(dy: Tensor, h: Tensor, weight: Tensor, rstd: Tensor, dh: Tensor | None = None) -> Tensor:
    """[T, H] in h's dtype: the gradient of x, and of a residual, from that of y and, where h was used too, of h."""
    check_gradient(h, dy, dh, statistics=(rstd,), weight=weight)
    if backend_of("rmsnorm", h.device.type, h.dtype) != "torch":
        return call(rmsnorm_input_grad_op, dy, h, weight, rstd, dh)
    rstd, wide = rstd.unsqueeze(1), h.to(wide_dtype(h))
    dx = dy * weight.to(wide.dtype)
    share = (dx * wide).mean(1, keepdim=True).mul_(rstd.square())
    dx = dx.addcmul_(wide, share, value=-1).mul_(rstd).to(h.dtype)
    return dx if dh is None else dx.add_(dh)


def rmsnorm_weight_grad(dy: Tensor, h: Tensor, rstd: Tensor) -> Tensor:
    """[H] in rstd's dtype, the same bits every time: sums of 128 rows each, then their sum."""
    check_gradient(h, dy, statistics=(rstd,))
    if backend_of("rmsnorm", h.device.type, h.dtype) != "torch":
        return call(rmsnorm_weight_grad_op, dy, h, rstd)
    return (h * rstd.unsqueeze(1)).mul_(dy).sum(0)


def _check(x: Tensor, weight: Tensor, residual: Tensor | None) -> None:
    other = x if residual is None else residual
    fits = x.dim() == 2 and weight.shape == x.shape[1:] and other.shape == x.shape and other.dtype == x.dtype
    if not fits or not floating(x, weight):
        raise ValueError(
            f"x {list(x.shape)} {x.dtype}, residual {list(other.shape)} {other.dtype}, weight {list(weight.shape)} "
            f"{weight.dtype}: need [T, H] of one dtype and [H], floating"
        )


# -------------------------------------------------------------------------------------------------------------- kernels


@triton.jit(launch_metadata=tells(lambda args: 4.0 * args["x"].numel()), do_not_specialize=["num_rows"])
def rmsnorm_forward_kernel(
    x, residual, weight, y, h, rstd, eps, num_rows, num_columns, x_stride, residual_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y, h [T, H], contiguous, and rstd [T]. residual and h: both, or None. Grid: tiles of whole rows."""
    rows, columns, exists = row_tile(num_rows, num_columns, ROWS, COLUMNS)
    value = tl.load(x + rows * x_stride + columns, mask=exists, other=0.0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + rows * residual_stride + columns, mask=exists, other=0.0).to(tl.float32)
        rounded = cast(value, h.dtype.element_ty)
        tl.store(h + rows * num_columns + columns, rounded, mask=exists)
        value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 1, keep_dims=True) / num_columns + eps)
    tl.store(rstd + rows, scale, mask=rows < num_rows)
    w = tl.load(weight + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
    tl.store(y + rows * num_columns + columns, cast(value * scale * w, y.dtype.element_ty), mask=exists)


@triton.jit(launch_metadata=tells(lambda args: 6.0 * args["dy"].numel()), do_not_specialize=["num_rows"])
def rmsnorm_input_grad_kernel(
    dy, h, weight, rstd, dh, dx, num_rows, num_columns, h_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """dx [T, H] from dy, and dh or None; contiguous but for h. Grid: tiles of whole rows."""
    rows, columns, exists = row_tile(num_rows, num_columns, ROWS, COLUMNS)
    at = rows * num_columns + columns
    scale = tl.load(rstd + rows, mask=rows < num_rows, other=0.0)
    w = tl.load(weight + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
    normal = tl.load(h + rows * h_stride + columns, mask=exists, other=0.0).to(tl.float32) * scale
    gradient = tl.load(dy + at, mask=exists, other=0.0).to(tl.float32) * w
    gradient = (gradient - normal * (tl.sum(gradient * normal, 1, keep_dims=True) / num_columns)) * scale
    if dh is not None:
        gradient += tl.load(dh + at, mask=exists, other=0.0).to(tl.float32)
    tl.store(dx + at, cast(gradient, dx.dtype.element_ty), mask=exists)


@triton.jit(launch_metadata=tells(lambda args: 3.0 * args["dy"].numel()), do_not_specialize=["num_rows"])
def rmsnorm_weight_grad_kernel(
    dy, h, rstd, partial, num_rows, num_columns, h_stride,
    BLOCK_ROWS: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """partial [blocks, H]: sums of BLOCK_ROWS rows each. Grid: blocks, tiles of columns."""
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    sums = tl.zeros([STEP, COLUMNS], tl.float32)
    for start in tl.range(0, BLOCK_ROWS, STEP):
        rows = tl.program_id(0) * BLOCK_ROWS + start + tl.arange(0, STEP)[:, None]
        exists = (rows < num_rows) & (columns < num_columns)
        scale = tl.load(rstd + rows, mask=rows < num_rows, other=0.0)
        rows = rows.to(tl.int64)
        normal = tl.load(h + rows * h_stride + columns, mask=exists, other=0.0).to(tl.float32) * scale
        sums += tl.load(dy + rows * num_columns + columns, mask=exists, other=0.0).to(tl.float32) * normal
    at = tl.program_id(0) * num_columns + columns
    tl.store(partial + at, tl.sum(sums, 0, keep_dims=True), mask=columns < num_columns)


# ------------------------------------------------------------------------------------------------------------- launches


def launch_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, y: Tensor, h: Tensor | None, rstd: Tensor, eps: float
) -> Launch:
    num_rows, num_columns = x.shape
    rows, columns, warps = whole_rows(num_columns)
    arguments = {
        "x": x, "residual": residual, "weight": weight, "y": y, "h": h, "rstd": rstd, "eps": eps, "num_rows": num_rows,
        "num_columns": num_columns, "x_stride": x.stride(0),
        "residual_stride": None if residual is None else residual.stride(0), "ROWS": rows, "COLUMNS": columns,
    }  # fmt: skip
    return Launch(rmsnorm_forward_kernel, (num_tiles(num_rows, rows), 1), arguments, warps=warps, stages=1)


def launch_input_grad(dy: Tensor, h: Tensor, weight: Tensor, rstd: Tensor, dh: Tensor | None, dx: Tensor) -> Launch:
    num_rows, num_columns = h.shape
    rows, columns, warps = whole_rows(num_columns)
    arguments = {
        "dy": dy, "h": h, "weight": weight, "rstd": rstd, "dh": dh, "dx": dx, "num_rows": num_rows,
        "num_columns": num_columns, "h_stride": h.stride(0), "ROWS": rows, "COLUMNS": columns,
    }  # fmt: skip
    return Launch(rmsnorm_input_grad_kernel, (num_tiles(num_rows, rows), 1), arguments, warps=warps, stages=1)


def launch_weight_grad(dy: Tensor, h: Tensor, rstd: Tensor, partial: Tensor) -> Launch:
    num_rows, num_columns = h.shape
    columns = min(COLUMNS, next_power_of_2(num_columns))
    arguments = {
        "dy": dy, "h": h, "rstd": rstd, "partial": partial, "num_rows": num_rows, "num_columns": num_columns,
        "h_stride": h.stride(0), "BLOCK_ROWS": BLOCK_ROWS, "STEP": STEP, "COLUMNS": columns,
    }  # fmt: skip
    grid = (num_tiles(num_rows, BLOCK_ROWS), num_tiles(num_columns, columns))
    return Launch(rmsnorm_weight_grad_kernel, grid, arguments, warps=max(1, STEP * columns // WARP), stages=2)


def whole_rows(num_columns: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of a tile that holds whole rows, so that a row is read once for its statistics and y."""
    columns = next_power_of_2(num_columns)
    rows = max(1, TILE // columns)
    return rows, columns, max(1, min(MOST_WARPS, rows * columns // WARP))


# ------------------------------------------------------------------------------------------------------------ operators


@custom_op("megapar::rmsnorm")
def rmsnorm_op(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y, rstd); arguments checked by `rmsnorm`."""
    y, rstd = x.new_empty(x.shape), _column(x)
    if y.numel():
        launch_forward(rows_of(x), None, weight.contiguous(), y, None, rstd, eps).run()
    return y, rstd


@custom_op("megapar::add_rmsnorm")
def add_rmsnorm_op(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y, h, rstd)"""
    y, h, rstd = x.new_empty(x.shape), x.new_empty(x.shape), _column(x)
    if y.numel():
        launch_forward(rows_of(x), rows_of(residual), weight.contiguous(), y, h, rstd, eps).run()
    return y, h, rstd


@custom_op("megapar::rmsnorm_input_grad")
def rmsnorm_input_grad_op(dy: Tensor, h: Tensor, weight: Tensor, rstd: Tensor, dh: Tensor | None) -> Tensor:
    dx = h.new_empty(h.shape)
    if dx.numel():
        dh = None if dh is None else dh.contiguous()
        launch_input_grad(dy.contiguous(), rows_of(h), weight.contiguous(), rstd.contiguous(), dh, dx).run()
    return dx


@custom_op("megapar::rmsnorm_weight_grad")
def rmsnorm_weight_grad_op(dy: Tensor, h: Tensor, rstd: Tensor) -> Tensor:
    partial = rstd.new_empty(num_tiles(len(h), BLOCK_ROWS), h.shape[1])
    if h.numel():
        launch_weight_grad(dy.contiguous(), rows_of(h), rstd.contiguous(), partial).run()
    return partial.sum(0)


def _column(x: Tensor) -> Tensor:
    return x.new_empty(len(x), dtype=torch.float32)


@rmsnorm_op.register_fake
def _(x, weight, eps):
    return x.new_empty(x.shape), _column(x)


@add_rmsnorm_op.register_fake
def _(x, residual, weight, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape), _column(x)


@rmsnorm_input_grad_op.register_fake
def _(dy, h, weight, rstd, dh):
    return h.new_empty(h.shape)


@rmsnorm_weight_grad_op.register_fake
def _(dy, h, rstd):
    return rstd.new_empty(h.shape[1])


# ----------------------------------------------------------------------------------------------------------- inspection


def aot_specs(arch: str) -> dict[str, Launch]:
    """The launches by name for Llama-8B's and the demo's widths, on tensors without storage."""
    specs = {}
    for sizes in (LLAMA, DEMO):
        width, dtype = sizes.hidden, sizes.torch_dtype
        with torch.device("meta"):
            x, weight = torch.empty(4096, width, dtype=dtype), torch.empty(width, dtype=dtype)
            rstd, partial = torch.empty(4096), torch.empty(4096 // BLOCK_ROWS, width)
        specs[f"rmsnorm_fwd_{width}"] = launch_forward(x, None, weight, x, None, rstd, 1e-5)
        specs[f"rmsnorm_add_fwd_{width}"] = launch_forward(x, x, weight, x, x, rstd, 1e-5)
        specs[f"rmsnorm_input_grad_{width}"] = launch_input_grad(x, x, weight, rstd, x, x)
        specs[f"rmsnorm_weight_grad_{width}"] = launch_weight_grad(x, x, rstd, partial)
    return specs


KERNEL = Kernel("rmsnorm", specs=aot_specs, place=2)
