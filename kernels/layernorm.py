"""LayerNorm (Ba et al. 2016), if wanted of a sum: h = x + residual, y = (h - mean) / deviation * weight + bias.

Made as `layernorm.py` is, with two numbers per row and two weights.

Shape letters: T tokens, H hidden.
"""

import torch
from torch import Tensor

from megapar.kernels import backend_of
from megapar.kernels._common import (
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
from megapar.kernels.rmsnorm import BLOCK_ROWS, COLUMNS, STEP, WARP, whole_rows
from megapar.kernels.shapes import GPT2, GPT2_TINY


def layernorm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y [T, H], h [T, H], mean [T], rstd [T]): y = (h - mean) * rstd * weight + bias, h = x + residual,
    rstd = 1 / sqrt(mean((h - mean)^2) + eps).

    x, residual [T, H], one floating dtype, which y and h have too; h is x itself without a residual. weight, bias [H],
    any floating dtype. Statistics and products are in fp32, or fp64 for fp64; h is rounded before it is normalised.
    Not differentiable: see `layernorm_input_grad`, `layernorm_weight_grad`. Raises ValueError for other shapes.
    """
    _check(x, weight, bias, residual)
    if backend_of("layernorm", x.device.type, x.dtype) != "torch":
        if residual is None:
            y, mean, rstd = call(layernorm_op, x, weight, bias, eps)
            return y, x, mean, rstd
        return call(add_layernorm_op, x, residual, weight, bias, eps)
    h = x if residual is None else x + residual
    wide = h.to(wide_dtype(h))
    mean = wide.mean(1, keepdim=True)
    centred = wide - mean
    rstd = torch.rsqrt(centred.square().mean(1, keepdim=True).add_(eps))
    return centred.mul_(rstd).mul_(weight).add_(bias).to(h.dtype), h, mean.squeeze(1), rstd.squeeze(1)


def layernorm_input_grad(
    dy: Tensor, h: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, dh: Tensor | None = None
) -> Tensor:
    """[T, H] in h's dtype: the gradient of x, and of a residual, from that of y and, where h was used too, of h."""
    check_gradient(h, dy, dh, statistics=(mean, rstd), weight=weight)
    if backend_of("layernorm", h.device.type, h.dtype) != "torch":
        return call(layernorm_input_grad_op, dy, h, weight, mean, rstd, dh)
    rstd, centred = rstd.unsqueeze(1), h - mean.unsqueeze(1)
    dx = dy * weight.to(centred.dtype)
    share = (dx * centred).mean(1, keepdim=True).mul_(rstd.square())
    dx = dx.sub_(dx.mean(1, keepdim=True)).addcmul_(centred, share, value=-1).mul_(rstd).to(h.dtype)
    return dx if dh is None else dx.add_(dh)


def layernorm_weight_grad(dy: Tensor, h: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """(of the weight, of the bias), [H] each in rstd's dtype, the same bits every time: sums of 128 rows each, then
    their sum."""
    check_gradient(h, dy, statistics=(mean, rstd))
    if backend_of("layernorm", h.device.type, h.dtype) != "torch":
        return call(layernorm_weight_grad_op, dy, h, mean, rstd)
    normal = (h - mean.unsqueeze(1)).mul_(rstd.unsqueeze(1))
    return normal.mul_(dy).sum(0), dy.sum(0, dtype=rstd.dtype)


def _check(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> None:
    other, wanted = x if residual is None else residual, x.shape[1:]
    fits = x.dim() == 2 and weight.shape == bias.shape == wanted and other.shape == x.shape and other.dtype == x.dtype
    if not fits or not floating(x, weight, bias):
        raise ValueError(
            f"x {list(x.shape)} {x.dtype}, residual {list(other.shape)} {other.dtype}, weight {list(weight.shape)} "
            f"{weight.dtype}, bias {list(bias.shape)} {bias.dtype}: need [T, H] of one dtype and [H] twice, floating"
        )


# -------------------------------------------------------------------------------------------------------------- kernels


@triton.jit(launch_metadata=tells(lambda args: 7.0 * args["x"].numel()), do_not_specialize=["num_rows"])
def layernorm_forward_kernel(
    x, residual, weight, bias, y, h, mean, rstd, eps, num_rows, num_columns, x_stride, residual_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y, h [T, H], contiguous, and mean, rstd [T]. residual and h: both, or None. Grid: tiles of whole rows."""
    rows, columns, exists = row_tile(num_rows, num_columns, ROWS, COLUMNS)
    value = tl.load(x + rows * x_stride + columns, mask=exists, other=0.0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + rows * residual_stride + columns, mask=exists, other=0.0).to(tl.float32)
        rounded = cast(value, h.dtype.element_ty)
        tl.store(h + rows * num_columns + columns, rounded, mask=exists)
        value = rounded.to(tl.float32)
    centre = tl.sum(value, 1, keep_dims=True) / num_columns
    value = tl.where(exists, value - centre, 0.0)
    scale = tl.rsqrt(tl.sum(value * value, 1, keep_dims=True) / num_columns + eps)
    tl.store(mean + rows, centre, mask=rows < num_rows)
    tl.store(rstd + rows, scale, mask=rows < num_rows)
    w = tl.load(weight + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
    b = tl.load(bias + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
    tl.store(y + rows * num_columns + columns, cast(value * scale * w + b, y.dtype.element_ty), mask=exists)


@triton.jit(launch_metadata=tells(lambda args: 8.0 * args["dy"].numel()), do_not_specialize=["num_rows"])
def layernorm_input_grad_kernel(
    dy, h, weight, mean, rstd, dh, dx, num_rows, num_columns, h_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """dx [T, H] from dy, and dh or None; contiguous but for h. Grid: tiles of whole rows."""
    rows, columns, exists = row_tile(num_rows, num_columns, ROWS, COLUMNS)
    at = rows * num_columns + columns
    centre = tl.load(mean + rows, mask=rows < num_rows, other=0.0)
    scale = tl.load(rstd + rows, mask=rows < num_rows, other=0.0)
    w = tl.load(weight + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
    value = tl.load(h + rows * h_stride + columns, mask=exists, other=0.0).to(tl.float32)
    normal = tl.where(exists, value - centre, 0.0) * scale
    gradient = tl.load(dy + at, mask=exists, other=0.0).to(tl.float32) * w
    common = tl.sum(gradient, 1, keep_dims=True) / num_columns
    gradient = (gradient - common - normal * (tl.sum(gradient * normal, 1, keep_dims=True) / num_columns)) * scale
    if dh is not None:
        gradient += tl.load(dh + at, mask=exists, other=0.0).to(tl.float32)
    tl.store(dx + at, cast(gradient, dx.dtype.element_ty), mask=exists)


@triton.jit(launch_metadata=tells(lambda args: 5.0 * args["dy"].numel()), do_not_specialize=["num_rows"])
def layernorm_weight_grad_kernel(
    dy, h, mean, rstd, partial, num_rows, num_columns, h_stride,
    BLOCK_ROWS: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """partial [2 (weight, bias), blocks, H]: sums of BLOCK_ROWS rows each. Grid: blocks, tiles of columns."""
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    of_weight, of_bias = tl.zeros([STEP, COLUMNS], tl.float32), tl.zeros([STEP, COLUMNS], tl.float32)
    for start in tl.range(0, BLOCK_ROWS, STEP):
        rows = tl.program_id(0) * BLOCK_ROWS + start + tl.arange(0, STEP)[:, None]
        exists = (rows < num_rows) & (columns < num_columns)
        centre = tl.load(mean + rows, mask=rows < num_rows, other=0.0)
        scale = tl.load(rstd + rows, mask=rows < num_rows, other=0.0)
        rows = rows.to(tl.int64)
        value = tl.load(h + rows * h_stride + columns, mask=exists, other=0.0).to(tl.float32)
        gradient = tl.load(dy + rows * num_columns + columns, mask=exists, other=0.0).to(tl.float32)
        of_bias += gradient
        of_weight += (value - centre) * (gradient * scale)
    at = tl.program_id(0) * num_columns + columns
    tl.store(partial + at, tl.sum(of_weight, 0, keep_dims=True), mask=columns < num_columns)
    at += tl.num_programs(0) * num_columns
    tl.store(partial + at, tl.sum(of_bias, 0, keep_dims=True), mask=columns < num_columns)


# ------------------------------------------------------------------------------------------------------------- launches


def launch_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    y: Tensor,
    h: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
) -> Launch:
    num_rows, num_columns = x.shape
    rows, columns, warps = whole_rows(num_columns)
    arguments = {
        "x": x, "residual": residual, "weight": weight, "bias": bias, "y": y, "h": h, "mean": mean, "rstd": rstd,
        "eps": eps, "num_rows": num_rows, "num_columns": num_columns, "x_stride": x.stride(0),
        "residual_stride": None if residual is None else residual.stride(0), "ROWS": rows, "COLUMNS": columns,
    }  # fmt: skip
    return Launch(layernorm_forward_kernel, (num_tiles(num_rows, rows), 1), arguments, warps=warps, stages=2)


def launch_input_grad(
    dy: Tensor, h: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, dh: Tensor | None, dx: Tensor
) -> Launch:
    num_rows, num_columns = h.shape
    rows, columns, warps = whole_rows(num_columns)
    arguments = {
        "dy": dy, "h": h, "weight": weight, "mean": mean, "rstd": rstd, "dh": dh, "dx": dx,
        "num_rows": num_rows, "num_columns": num_columns, "h_stride": h.stride(0), "ROWS": rows, "COLUMNS": columns,
    }  # fmt: skip
    return Launch(layernorm_input_grad_kernel, (num_tiles(num_rows, rows), 1), arguments, warps=warps, stages=2)


def launch_weight_grad(dy: Tensor, h: Tensor, mean: Tensor, rstd: Tensor, partial: Tensor) -> Launch:
    num_rows, num_columns = h.shape
    columns = min(COLUMNS, next_power_of_2(num_columns))
    arguments = {
        "dy": dy, "h": h, "mean": mean, "rstd": rstd, "partial": partial, "num_rows": num_rows,
        "num_columns": num_columns, "h_stride": h.stride(0), "BLOCK_ROWS": BLOCK_ROWS, "STEP": STEP, "COLUMNS": columns,
    }  # fmt: skip
    grid = (num_tiles(num_rows, BLOCK_ROWS), num_tiles(num_columns, columns))
    return Launch(layernorm_weight_grad_kernel, grid, arguments, warps=max(1, STEP * columns // WARP), stages=2)


# ------------------------------------------------------------------------------------------------------------ operators


@custom_op("megapar::layernorm")
def layernorm_op(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd); arguments checked by `layernorm`."""
    y, mean, rstd = x.new_empty(x.shape), _column(x), _column(x)
    if y.numel():
        weights = (weight.contiguous(), bias.contiguous())
        launch_forward(rows_of(x), None, *weights, y, None, mean, rstd, eps).run()
    return y, mean, rstd


@custom_op("megapar::add_layernorm")
def add_layernorm_op(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, h, mean, rstd)"""
    y, h, mean, rstd = x.new_empty(x.shape), x.new_empty(x.shape), _column(x), _column(x)
    if y.numel():
        weights = (weight.contiguous(), bias.contiguous())
        launch_forward(rows_of(x), rows_of(residual), *weights, y, h, mean, rstd, eps).run()
    return y, h, mean, rstd


@custom_op("megapar::layernorm_input_grad")
def layernorm_input_grad_op(
    dy: Tensor, h: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, dh: Tensor | None
) -> Tensor:
    dx = h.new_empty(h.shape)
    if dx.numel():
        dh = None if dh is None else dh.contiguous()
        statistics = (mean.contiguous(), rstd.contiguous())
        launch_input_grad(dy.contiguous(), rows_of(h), weight.contiguous(), *statistics, dh, dx).run()
    return dx


@custom_op("megapar::layernorm_weight_grad")
def layernorm_weight_grad_op(dy: Tensor, h: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """(of the weight, of the bias)"""
    partial = rstd.new_empty(2, num_tiles(len(h), BLOCK_ROWS), h.shape[1])
    if h.numel():
        launch_weight_grad(dy.contiguous(), rows_of(h), mean.contiguous(), rstd.contiguous(), partial).run()
    return partial[0].sum(0), partial[1].sum(0)


def _column(x: Tensor) -> Tensor:
    return x.new_empty(len(x), dtype=torch.float32)


@layernorm_op.register_fake
def _(x, weight, bias, eps):
    return x.new_empty(x.shape), _column(x), _column(x)


@add_layernorm_op.register_fake
def _(x, residual, weight, bias, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape), _column(x), _column(x)


@layernorm_input_grad_op.register_fake
def _(dy, h, weight, mean, rstd, dh):
    return h.new_empty(h.shape)


@layernorm_weight_grad_op.register_fake
def _(dy, h, mean, rstd):
    return rstd.new_empty(h.shape[1]), rstd.new_empty(h.shape[1])


# ----------------------------------------------------------------------------------------------------------- inspection


def aot_specs(arch: str) -> dict[str, Launch]:
    """The launches by name for GPT-2's widths and those of its tiny sister, on tensors without storage."""
    specs = {}
    for sizes in (GPT2, GPT2_TINY):
        width, dtype = sizes.hidden, sizes.torch_dtype
        with torch.device("meta"):
            x, weight = torch.empty(4096, width, dtype=dtype), torch.empty(width, dtype=dtype)
            column, partial = torch.empty(4096), torch.empty(2, 4096 // BLOCK_ROWS, width)
        specs[f"layernorm_fwd_{width}"] = launch_forward(x, None, weight, weight, x, None, column, column, 1e-5)
        specs[f"layernorm_add_fwd_{width}"] = launch_forward(x, x, weight, weight, x, x, column, column, 1e-5)
        specs[f"layernorm_input_grad_{width}"] = launch_input_grad(x, x, weight, column, column, x, x)
        specs[f"layernorm_weight_grad_{width}"] = launch_weight_grad(x, x, column, column, partial)
    return specs


KERNEL = Kernel("layernorm", specs=aot_specs, place=3)
