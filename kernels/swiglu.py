"""The MLP's activations: SwiGLU and GEGLU (Shazeer 2020), gated, and GELU (Hendrycks & Gimpel 2016) in two forms.

One pair of kernels for all. They move each byte once and are bound by memory, compute in fp32 and round once, where
torch in 16 bits rounds the gate's activation too.

Shape letters: T tokens, F inner width of the MLP.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megapar.kernels import backend_of
from megapar.kernels._common import (
    INTERPRETED,
    Launch,
    cast,
    device_function,
    next_power_of_2,
    num_tiles,
    row_tile,
    rows_of,
    tells,
    tl,
    triton,
)
from megapar.kernels._operators import call, custom_op
from megapar.kernels.registry import Kernel
from megapar.kernels.shapes import BERT, DEMO, GEMMA, GPT2, GPT2_TINY, LLAMA

# Rows and columns of a program's tile, and columns of a warp: at least 128 bits for each thread, also of AMD's wider
# warps. The interpreter pays for every program.
ROWS, COLUMNS, WARP = 64 if INTERPRETED else 1, 2048, 512


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) * up, elementwise: [T, F], [T, F] -> [T, F], one floating dtype.

    Either may be a column slice of a wider matrix. Without up the first is both, gate beside up [T, 2F], as a fused
    projection leaves them: its gradient is one matrix then, which nobody puts together. Raises ValueError for different
    shapes or dtypes, and where the backend that was asked for can't run. The Triton gradients can be differentiated no
    further.
    """
    return _gated("swiglu", "silu", gate, up)


def geglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """gelu(gate) * up, as `swiglu` in all else."""
    return _gated("geglu", "gelu", gate, up)


def _gated(name: str, function: str, gate: Tensor, up: Tensor | None) -> Tensor:
    if up is None and (gate.dim() != 2 or gate.shape[1] % 2):
        raise ValueError(f"gate and up {list(gate.shape)} {gate.dtype}: need [T, 2F], floating")
    first, second = gate.chunk(2, 1) if up is None else (gate, up)
    _check(first, second)
    if backend_of(name, gate.device.type, gate.dtype) == "torch":
        return (F.silu(first) if function == "silu" else F.gelu(first, approximate="tanh")) * second
    return call(fused_op, gate, function) if up is None else call(gated_op, gate, up, function)


def gelu(x: Tensor) -> Tensor:
    """GELU in the form with a tanh (GPT-2's), elementwise: [T, F] -> [T, F]. x as `swiglu`'s gate."""
    _check(x, x)
    if backend_of("gelu", x.device.type, x.dtype) == "torch":
        return F.gelu(x, approximate="tanh")
    return call(gelu_op, x, "gelu")


def gelu_erf(x: Tensor) -> Tensor:
    """GELU itself (BERT's): x times the normal distribution's share below x. As `gelu` in all else."""
    _check(x, x)
    if backend_of("gelu_erf", x.device.type, x.dtype) == "torch":
        return F.gelu(x)
    return call(gelu_op, x, "gelu_erf")


def _check(gate: Tensor, up: Tensor) -> None:
    if gate.dim() != 2 or gate.shape != up.shape or gate.dtype != up.dtype or not gate.is_floating_point():
        if up is gate:
            raise ValueError(f"x {list(gate.shape)} {gate.dtype}: need [T, F], floating")
        shapes = f"gate {list(gate.shape)} {gate.dtype}, up {list(up.shape)} {up.dtype}"
        raise ValueError(f"{shapes}: need [T, F] twice, of one floating dtype")


# -------------------------------------------------------------------------------------------------------------- kernels
# Two functions are x * sigmoid(s(x)): silu with s = x, and gelu with s = 2 sqrt(2/pi) (x + 0.044715 x^3), because
# (1 + tanh(s/2)) / 2 = sigmoid(s). That needs one exponential, and no tanh, which Triton's language does not have.
# gelu_erf is x * P(x), with P the distribution function of the normal distribution.


@device_function
def _share_and_slope(x, FUNCTION: tl.constexpr):
    """(sigmoid(s(x)), ds/dx), FUNCTION: silu or gelu; of gelu_erf (P(x), dP/dx)."""
    if FUNCTION == "gelu_erf":
        share = 0.5 + 0.5 * tl.erf(0.7071067811865476 * x)
        slope = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        if FUNCTION == "gelu":
            square = x * x
            s = x * (1.5957691216057308 + 0.07135481627260025 * square)
            slope = 1.5957691216057308 + 0.21406444881780076 * square
        else:
            s, slope = x, 1.0
        share = 1.0 / (1.0 + tl.exp(-s))
    return share, slope


def _forward_flops(args: dict[str, Any]) -> float:
    """An exponential is one, and so is a division; gelu has four more for its s(x), gelu_erf one more (erf counts as
    one), the product with up is one."""
    more = {"silu": 0.0, "gelu": 4.0, "gelu_erf": 1.0}[args["FUNCTION"]]
    return (4.0 + more + (args["up"] is not None)) * args["gate"].numel()


def _backward_flops(args: dict[str, Any]) -> float:
    """gelu has seven more, for s(x) and its slope, gelu_erf three; up's part is a product with it and its own
    gradient."""
    more = {"silu": 0.0, "gelu": 7.0, "gelu_erf": 3.0}[args["FUNCTION"]]
    return (8.0 + more + 2.0 * (args["up"] is not None)) * args["gate"].numel()


@triton.jit(launch_metadata=tells(_forward_flops), do_not_specialize=["num_rows"])
def activation_forward_kernel(
    gate, up, out, num_rows, num_columns, gate_stride, up_stride,
    FUNCTION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out [T, F], contiguous. up: None where there is no gate but only its activation. Grid: tiles of rows, columns."""
    rows, columns, exists = row_tile(num_rows, num_columns, ROWS, COLUMNS)
    x = tl.load(gate + rows * gate_stride + columns, mask=exists, other=0.0).to(tl.float32)
    u = 1.0 if up is None else tl.load(up + rows * up_stride + columns, mask=exists, other=0.0).to(tl.float32)
    share, _ = _share_and_slope(x, FUNCTION)
    tl.store(out + rows * num_columns + columns, cast(x * share * u, out.dtype.element_ty), mask=exists)


@triton.jit(launch_metadata=tells(_backward_flops), do_not_specialize=["num_rows"])
def activation_backward_kernel(
    gate, up, dout, dgate, dup, num_rows, num_columns, gate_stride, up_stride, gradient_stride,
    FUNCTION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dgate, dup [T, F], rows alike, from dout [T, F], contiguous. up and dup: both, or None. Grid as the forward's."""
    rows, columns, exists = row_tile(num_rows, num_columns, ROWS, COLUMNS)
    at = rows * gradient_stride + columns
    x = tl.load(gate + rows * gate_stride + columns, mask=exists, other=0.0).to(tl.float32)
    u = 1.0 if up is None else tl.load(up + rows * up_stride + columns, mask=exists, other=0.0).to(tl.float32)
    d = tl.load(dout + rows * num_columns + columns, mask=exists, other=0.0).to(tl.float32)
    share, slope = _share_and_slope(x, FUNCTION)
    value = x * share
    if FUNCTION == "gelu_erf":
        gradient = d * u * (share + x * slope)
    else:
        gradient = d * u * (share + value * (1.0 - share) * slope)
    tl.store(dgate + at, cast(gradient, dgate.dtype.element_ty), mask=exists)
    if dup is not None:
        tl.store(dup + at, cast(d * value, dup.dtype.element_ty), mask=exists)


# ------------------------------------------------------------------------------------------------------------- launches


def launch(kernel: Any, function: str, gate: Tensor, up: Tensor | None, **tensors: Tensor | None) -> Launch:
    """A launch of either kernel; function: silu, gelu or gelu_erf. gate, up: rows may lie apart, columns together."""
    num_rows, num_columns = gate.shape
    columns = min(COLUMNS, next_power_of_2(num_columns))
    arguments = {
        "gate": gate, "up": up, **tensors, "num_rows": num_rows, "num_columns": num_columns,
        "gate_stride": gate.stride(0), "up_stride": None if up is None else up.stride(0), "FUNCTION": function,
        "ROWS": ROWS, "COLUMNS": columns,
    }  # fmt: skip
    if (dgate := tensors.get("dgate")) is not None:
        arguments["gradient_stride"] = dgate.stride(0)
    grid = (num_tiles(num_rows, ROWS), num_tiles(num_columns, columns))
    return Launch(kernel, grid, arguments, warps=num_tiles(columns, WARP), stages=1)


# ------------------------------------------------------------------------------------------------------------ operators


@custom_op("megapar::gated")
def gated_op(gate: Tensor, up: Tensor, function: str) -> Tensor:
    """function(gate) * up, contiguous; arguments checked by `swiglu`."""
    out = gate.new_empty(gate.shape)
    if out.numel():
        launch(activation_forward_kernel, function, rows_of(gate), rows_of(up), out=out).run()
    return out


@custom_op("megapar::gated_backward")
def gated_backward_op(dout: Tensor, gate: Tensor, up: Tensor, function: str) -> tuple[Tensor, Tensor]:
    """(dgate, dup), contiguous."""
    dgate, dup = gate.new_empty(gate.shape), up.new_empty(up.shape)
    if dgate.numel():
        inputs = (rows_of(gate), rows_of(up))
        launch(activation_backward_kernel, function, *inputs, dout=dout.contiguous(), dgate=dgate, dup=dup).run()
    return dgate, dup


@custom_op("megapar::gated_fused")
def fused_op(x: Tensor, function: str) -> Tensor:
    """The same of x [T, 2F], gate beside up."""
    gate, up = rows_of(x).chunk(2, 1)
    out = x.new_empty(gate.shape)
    if out.numel():
        launch(activation_forward_kernel, function, gate, up, out=out).run()
    return out


@custom_op("megapar::gated_fused_backward")
def fused_backward_op(dout: Tensor, x: Tensor, function: str) -> Tensor:
    """dx [T, 2F], contiguous."""
    dx = x.new_empty(x.shape)
    (gate, up), (dgate, dup) = rows_of(x).chunk(2, 1), dx.chunk(2, 1)
    if dx.numel():
        given = {"dout": dout.contiguous(), "dgate": dgate, "dup": dup}
        launch(activation_backward_kernel, function, gate, up, **given).run()
    return dx


@custom_op("megapar::gelu")
def gelu_op(x: Tensor, function: str) -> Tensor:
    """function(x), gelu or gelu_erf, contiguous."""
    out = x.new_empty(x.shape)
    if out.numel():
        launch(activation_forward_kernel, function, rows_of(x), None, out=out).run()
    return out


@custom_op("megapar::gelu_backward")
def gelu_backward_op(dout: Tensor, x: Tensor, function: str) -> Tensor:
    """dx, contiguous."""
    dx = x.new_empty(x.shape)
    if dx.numel():
        gradients = {"dout": dout.contiguous(), "dgate": dx, "dup": None}
        launch(activation_backward_kernel, function, rows_of(x), None, **gradients).run()
    return dx


@gated_op.register_fake
def _(gate, up, function):
    return gate.new_empty(gate.shape)


@gated_backward_op.register_fake
def _(dout, gate, up, function):
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


@fused_op.register_fake
def _(x, function):
    return x.new_empty(len(x), x.shape[1] // 2)


@fused_backward_op.register_fake
def _(dout, x, function):
    return x.new_empty(x.shape)


@gelu_op.register_fake
def _(x, function):
    return x.new_empty(x.shape)


@gelu_backward_op.register_fake
def _(dout, x, function):
    return x.new_empty(x.shape)


def _save_gated(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
    gate, up, ctx.function = inputs
    ctx.save_for_backward(gate, up)


def _gated_backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, None]:
    return *call(gated_backward_op, dout, *ctx.saved_tensors, ctx.function), None


def _save_one(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    x, ctx.function = inputs
    ctx.save_for_backward(x)


def _fused_backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
    return call(fused_backward_op, dout, *ctx.saved_tensors, ctx.function), None


def _gelu_backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
    return call(gelu_backward_op, dout, *ctx.saved_tensors, ctx.function), None


gated_op.register_autograd(_gated_backward, setup_context=_save_gated)
fused_op.register_autograd(_fused_backward, setup_context=_save_one)
gelu_op.register_autograd(_gelu_backward, setup_context=_save_one)


# ----------------------------------------------------------------------------------------------------------- inspection

# name -> (function, the models whose MLP has it)
MODELS = {
    "swiglu": ("silu", (LLAMA, DEMO)),
    "geglu": ("gelu", (GEMMA,)),
    "gelu": ("gelu", (GPT2, GPT2_TINY)),
    "gelu_erf": ("gelu_erf", (BERT,)),
}


def aot_specs(arch: str) -> dict[str, Launch]:
    """The launches of MODELS by name, on tensors without storage."""
    specs = {}
    for name, (function, models) in MODELS.items():
        for sizes in models:
            width, dtype = sizes.ffn, sizes.torch_dtype
            out = torch.empty(4096, width, dtype=dtype, device="meta")
            gate, up = out, None
            if name in ("swiglu", "geglu"):
                gate, up = torch.empty(4096, 2 * width, dtype=dtype, device="meta").split(width, 1)
            specs[f"{name}_fwd_{width}"] = launch(activation_forward_kernel, function, gate, up, out=out)
            gradients = {"dout": out, "dgate": gate, "dup": up}  # as the inputs lie
            specs[f"{name}_bwd_{width}"] = launch(activation_backward_kernel, function, gate, up, **gradients)
    return specs


KERNEL = Kernel("swiglu", functions=("swiglu", "geglu", "gelu", "gelu_erf"), specs=aot_specs, place=5)
