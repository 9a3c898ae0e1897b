"""Dropout whose keep-mask is a function of coordinates, equal in every layout, in recomputation and in both forms.

The kernel makes the mask in registers, forward and again backward, and adds the residual stream in the same pass;
torch's form stores a mask and takes some hundred operations. The kernel computes in fp32 and rounds once, where torch
in 16 bits rounds the scaled value and the sum.

Shape letters: t tokens of this rank, H channels.
"""

from collections.abc import Sequence
from typing import Any

import torch
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
from megapar.kernels.shapes import GPT2, GPT2_TINY

_A, _B = -49064778989728563, -4265267296055464877  # the multipliers of MurmurHash3's 64-bit finaliser, as int64
_CHANNEL = 0x2545F4914F6CDD1D  # from a channel to the next
_WORD = 1 << 64
# The same for the kernel, whose numbers have no sign.
A, B, CHANNEL = tl.constexpr(_A % _WORD), tl.constexpr(_B % _WORD), tl.constexpr(_CHANNEL)

# Elements of a program's tile, of whole rows or of one, and of a warp: as of the activations, see `kernels/swiglu.py`.
TILE, WARP = 1 << 17 if INTERPRETED else 2048, 512


def _shift(x: Tensor) -> Tensor:
    """x ^ (x >>> 33) on int64, whose own >> keeps the sign."""
    return x ^ ((x >> 33) & 0x7FFFFFFF)


def _mix(x: Tensor) -> Tensor:
    """MurmurHash3's 64-bit finaliser: a bijection that lets every input bit reach every output bit."""
    return _shift(_shift(_shift(x) * _A) * _B)


def keep_mask(probability: float, token_keys: Tensor, channels: int) -> Tensor:
    """[t, channels] bool, True with the given probability.

    token_keys [t] int64: one well-mixed key per token (see `token_keys`). Channel c of a token is a function of the
    token's key and c alone.
    """
    channel = torch.arange(channels, device=token_keys.device)
    draws = _mix(token_keys.unsqueeze(1) + channel * _CHANNEL)
    return ((draws >> 11) & ((1 << 53) - 1)) < int(probability * (1 << 53))


def token_keys(samples: Tensor, positions: Tensor, *site: int) -> Tensor:
    """[t] int64 keys from global sample numbers [t], positions [t] and the site (seed, step, layer, place)."""
    key = torch.zeros_like(samples)
    for number in site:
        key = _mix(key + number + 1)
    return _mix(_mix(key + samples + 1) + positions + 1)


def site_key(site: Sequence[int]) -> int:
    """What `token_keys` makes of the site alone, as int64."""
    key = 0
    for number in site:
        key = (key + number + 1) % _WORD
        for multiplier in (_A, _B):
            key = (key ^ (key >> 33)) * multiplier % _WORD
        key ^= key >> 33
    return key - _WORD if key >> 63 else key


def dropout(
    x: Tensor, rate: float, samples: Tensor, positions: Tensor, site: Sequence[int], residual: Tensor | None = None
) -> Tensor:
    """residual + x with elements of x [t, H] zeroed at the given rate and the rest scaled by 1 / (1 - rate).

    samples, positions [t] int64: each token's place in all data; site: whatever else the mask depends on. residual
    [t, H] in the dtype of x. Raises ValueError for integers, for other shapes, and for a rate outside [0, 1). The
    gradients of Triton's form can be differentiated no further.
    """
    _check(x, rate, samples, positions, residual)
    if backend_of("dropout", x.device.type, x.dtype) != "torch":
        return call(dropout_op, x, residual, samples, positions, list(site), rate)
    y = x * keep_mask(1.0 - rate, token_keys(samples, positions, *site), x.shape[1]) * (1.0 / (1.0 - rate))
    return y if residual is None else residual + y


def _check(x: Tensor, rate: float, samples: Tensor, positions: Tensor, residual: Tensor | None) -> None:
    if not 0 <= rate < 1:
        raise ValueError(f"rate {rate}: need at least 0 and less than 1")
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x {list(x.shape)} {x.dtype}: need [t, H] in a floating dtype")
    for name, numbers in (("samples", samples), ("positions", positions)):
        if numbers.shape != x.shape[:1] or numbers.dtype != torch.int64:
            raise ValueError(f"{name} {list(numbers.shape)} {numbers.dtype}: need int64 [{len(x)}]")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(f"residual {list(residual.shape)} {residual.dtype}: need {list(x.shape)} {x.dtype}")


# -------------------------------------------------------------------------------------------------------------- kernels


@device_function
def mix(x):
    """`_mix` on uint64."""
    x = (x ^ (x >> 33)) * A
    x = (x ^ (x >> 33)) * B
    return x ^ (x >> 33)


@triton.jit(
    # The hash is not counted: two products of 64 bits, and what belongs to them, for every element.
    launch_metadata=tells(lambda args: (2.0 + (args["residual"] is not None)) * args["x"].numel()),
    do_not_specialize=["key", "threshold", "num_rows"],
)
def dropout_kernel(
    x, residual, out, samples, positions, key, threshold, scale, num_rows, num_columns, x_stride, residual_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out [t, H], contiguous. residual: None without one. Grid: tiles of rows, of columns."""
    rows, columns, exists = row_tile(num_rows, num_columns, ROWS, COLUMNS)
    sample = tl.load(samples + rows, mask=rows < num_rows, other=0).to(tl.uint64)
    position = tl.load(positions + rows, mask=rows < num_rows, other=0).to(tl.uint64)
    token = mix(mix(sample + tl.cast(key, tl.int64).to(tl.uint64) + 1) + position + 1)
    draws = mix(token + columns.to(tl.uint64) * CHANNEL)
    kept = (draws >> 11).to(tl.int64) < threshold
    y = tl.load(x + rows * x_stride + columns, mask=exists, other=0.0).to(tl.float32)
    y = y * kept.to(tl.float32) * scale
    if residual is not None:
        y += tl.load(residual + rows * residual_stride + columns, mask=exists, other=0.0).to(tl.float32)
    tl.store(out + rows * num_columns + columns, cast(y, out.dtype.element_ty), mask=exists)


# ------------------------------------------------------------------------------------------------------------- launches


def launch(
    x: Tensor, residual: Tensor | None, out: Tensor, samples: Tensor, positions: Tensor, key: int, rate: float
) -> Launch:
    """x, residual: rows may lie apart, columns together."""
    num_rows, num_columns = x.shape
    columns = min(TILE, next_power_of_2(num_columns))
    rows = max(1, (TILE if INTERPRETED else WARP) // columns)
    arguments = {
        "x": x, "residual": residual, "out": out, "samples": samples, "positions": positions, "key": key,
        "threshold": int((1.0 - rate) * (1 << 53)), "scale": 1.0 / (1.0 - rate), "num_rows": num_rows,
        "num_columns": num_columns, "x_stride": x.stride(0),
        "residual_stride": None if residual is None else residual.stride(0), "ROWS": rows, "COLUMNS": columns,
    }  # fmt: skip
    grid = (num_tiles(num_rows, rows), num_tiles(num_columns, columns))
    return Launch(dropout_kernel, grid, arguments, warps=num_tiles(columns, WARP), stages=1)


# ------------------------------------------------------------------------------------------------------------ operators


@custom_op("megapar::dropout")
def dropout_op(
    x: Tensor, residual: Tensor | None, samples: Tensor, positions: Tensor, site: Sequence[int], rate: float
) -> Tensor:
    """Contiguous; arguments checked by `dropout`."""
    out = x.new_empty(x.shape)
    if out.numel():
        stream = None if residual is None else rows_of(residual)
        places = (samples.contiguous(), positions.contiguous())
        launch(rows_of(x), stream, out, *places, site_key(site), rate).run()
    return out


@dropout_op.register_fake
def _(x, residual, samples, positions, site, rate):
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, residual, samples, positions, ctx.site, ctx.rate = inputs
    ctx.adds = residual is not None
    ctx.save_for_backward(samples, positions)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    dx = call(dropout_op, dout, None, *ctx.saved_tensors, ctx.site, ctx.rate) if ctx.needs_input_grad[0] else None
    return dx, dout if ctx.adds else None, None, None, None, None


dropout_op.register_autograd(_backward, setup_context=_save)


# ----------------------------------------------------------------------------------------------------------- inspection


def aot_specs(arch: str) -> dict[str, Launch]:
    """The launches by name for GPT-2's hidden states and those of its small sister, on tensors without storage."""
    specs = {}
    for sizes in (GPT2, GPT2_TINY):
        with torch.device("meta"):
            x, places = torch.empty(4096, sizes.hidden, dtype=sizes.torch_dtype), torch.empty(4096, dtype=torch.int64)
        for name, residual in (("add_dropout", x), ("dropout", None)):
            specs[f"{name}_{sizes.hidden}"] = launch(x, residual, x, places, places, 1 << 62, 0.1)
    return specs


KERNEL = Kernel("dropout", specs=aot_specs, place=8)
