"""SwiGLU (Shazeer 2020): the gated activation of Llama's MLP.

Both kernels move each byte once and are bound by memory. They compute in fp32 and round once, where torch in 16 bits
rounds silu(gate) too.
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
    every_tensor_once,
    next_power_of_2,
    num_tiles,
    row_tile,
    rows_of,
    tl,
    triton,
)

# Rows and columns of a program's tile, and columns of a warp: at least 128 bits for each thread, also of AMD's wider
# warps. The interpreter pays for every program.
ROWS, COLUMNS, WARP = 64 if INTERPRETED else 1, 2048, 512


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise: [T, F], [T, F] -> [T, F], one floating dtype.

    Either may be a column slice of a wider matrix. Raises ValueError for different shapes or dtypes, and where the
    backend that was asked for can't run. The Triton gradients can be differentiated no further.
    """
    if gate.dim() != 2 or gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"gate {list(gate.shape)} {gate.dtype}, up {list(up.shape)} {up.dtype}: need [T, F] twice")
    if backend_of("swiglu", gate.device.type, gate.dtype) == "torch":
        return F.silu(gate) * up
    return swiglu_op(gate, up)


# -------------------------------------------------------------------------------------------------------------- kernels


@triton.jit(launch_metadata=every_tensor_once, do_not_specialize=["num_rows"])
def forward_kernel(
    gate, up, out, num_rows, num_columns, gate_stride, up_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """out [T, F], contiguous. Grid: tiles of rows, tiles of columns."""
    rows, columns, exists = row_tile(num_rows, num_columns, ROWS, COLUMNS)
    g = tl.load(gate + rows * gate_stride + columns, mask=exists, other=0.0).to(tl.float32)
    u = tl.load(up + rows * up_stride + columns, mask=exists, other=0.0).to(tl.float32)
    tl.store(out + rows * num_columns + columns, cast(g * u / (1.0 + tl.exp(-g)), out.dtype.element_ty), mask=exists)


@triton.jit(launch_metadata=every_tensor_once, do_not_specialize=["num_rows"])
def backward_kernel(
    gate, up, dout, dgate, dup, num_rows, num_columns, gate_stride, up_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dgate, dup [T, F] from dout [T, F], all contiguous. Grid as the forward's."""
    rows, columns, exists = row_tile(num_rows, num_columns, ROWS, COLUMNS)
    at = rows * num_columns + columns
    g = tl.load(gate + rows * gate_stride + columns, mask=exists, other=0.0).to(tl.float32)
    u = tl.load(up + rows * up_stride + columns, mask=exists, other=0.0).to(tl.float32)
    d = tl.load(dout + at, mask=exists, other=0.0).to(tl.float32)
    share = 1.0 / (1.0 + tl.exp(-g))
    silu = g * share
    tl.store(dgate + at, cast(d * u * (share + silu * (1.0 - share)), dgate.dtype.element_ty), mask=exists)
    tl.store(dup + at, cast(d * silu, dup.dtype.element_ty), mask=exists)


# ------------------------------------------------------------------------------------------------------------- launches


def launch(kernel: Any, gate: Tensor, up: Tensor, **tensors: Tensor) -> Launch:
    """A launch of either kernel. gate, up: rows may lie apart, columns together."""
    num_rows, num_columns = gate.shape
    columns = min(COLUMNS, next_power_of_2(num_columns))
    arguments = {
        "gate": gate, "up": up, **tensors, "num_rows": num_rows, "num_columns": num_columns,
        "gate_stride": gate.stride(0), "up_stride": up.stride(0), "ROWS": ROWS, "COLUMNS": columns,
    }  # fmt: skip
    grid = (num_tiles(num_rows, ROWS), num_tiles(num_columns, columns))
    return Launch(kernel, grid, arguments, warps=num_tiles(columns, WARP), stages=1)


# ------------------------------------------------------------------------------------------------------------ operators


@torch.library.custom_op("megapar::swiglu", mutates_args=())
def swiglu_op(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, contiguous; arguments checked by `swiglu`."""
    out = gate.new_empty(gate.shape)
    if out.numel():
        launch(forward_kernel, rows_of(gate), rows_of(up), out=out).run()
    return out


@torch.library.custom_op("megapar::swiglu_backward", mutates_args=())
def swiglu_backward_op(dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(dgate, dup), contiguous."""
    dgate, dup = gate.new_empty(gate.shape), up.new_empty(up.shape)
    if dgate.numel():
        gate, up = rows_of(gate), rows_of(up)
        launch(backward_kernel, gate, up, dout=dout.contiguous(), dgate=dgate, dup=dup).run()
    return dgate, dup


@swiglu_op.register_fake
def _(gate, up):
    return gate.new_empty(gate.shape)


@swiglu_backward_op.register_fake
def _(dout, gate, up):
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
    return swiglu_backward_op(dout, *ctx.saved_tensors)


swiglu_op.register_autograd(_backward, setup_context=_save)


# ----------------------------------------------------------------------------------------------------------- inspection


def aot_specs(arch: str) -> dict[str, Launch]:
    """The launches by name for Llama-8B's and the demo's widths, on tensors without storage."""
    specs = {}
    for width, dtype in ((14336, torch.bfloat16), (384, torch.float32)):
        gate, up = torch.empty(4096, 2 * width, dtype=dtype, device="meta").split(width, 1)
        out = torch.empty(4096, width, dtype=dtype, device="meta")
        specs[f"swiglu_fwd_{width}"] = launch(forward_kernel, gate, up, out=out)
        specs[f"swiglu_bwd_{width}"] = launch(backward_kernel, gate, up, dout=out, dgate=out, dup=out)
    return specs
