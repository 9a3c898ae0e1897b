"""Rotary position embedding (Su et al. 2021): pairs of channels, turned by an angle that grows with the position.

Queries and keys are turned in one pass. Turning back, by the negative angle, is the gradient.

Shape letters: B samples, S positions, N query heads, K key heads, D channels, P positions of the table.
"""

from typing import Any

import torch
from torch import Tensor

from megapar.kernels import backend_of
from megapar.kernels._common import (
    INTERPRETED,
    Launch,
    cast,
    device_function,
    matrix,
    next_power_of_2,
    num_tiles,
    tells,
    tl,
    triton,
)
from megapar.kernels._operators import call, custom_op
from megapar.kernels.registry import Kernel
from megapar.kernels.shapes import DEMO, LLAMA

# Channels of one head that a program turns at a time: 128 bits for each thread. The interpreter pays for every program.
TILE, WARPS = 1 << 14 if INTERPRETED else 2048, 4


def rope_frequencies(channels: int, theta: float) -> Tensor:
    """Radians per position of every pair of channels, fp64 [channels / 2]: theta^(-2 i / channels)."""
    return theta ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)


def rope_table(length: int, channels: int, theta: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`table_of` the frequencies of this base."""
    return table_of(rope_frequencies(channels, theta), length, dtype, device)


def table_of(frequencies: Tensor, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[length, channels]: cosines in the first half of the channels, sines in the second. Computed in fp64 from
    frequencies [channels / 2]."""
    positions = torch.arange(length, dtype=torch.float64, device=device)
    angle = positions.unsqueeze(1) * frequencies.to(device, torch.float64)
    return torch.cat([angle.cos(), angle.sin()], 1).to(dtype)


def rope(
    q: Tensor, k: Tensor, table: Tensor, *, offsets: Tensor | None = None, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """Turn q [B, S, N, D] and k [B, S, K, D] by their positions, in the table's dtype; both keep their own.

    table [P, D] of `rope_table`, at least fp32. offsets [B] int64: the position of every sample's first row, 0 without
    them; nothing checks on a GPU that offsets + S <= P. The pairs are channels (i, i + D/2), Llama's; interleaved
    (2i, 2i + 1), GPT-J's. Raises ValueError for other shapes and dtypes.
    """
    check(q, k, table, offsets)
    if backend_of("rope", q.device.type, q.dtype) != "torch":
        return call(rope_op, q, k, table, offsets, interleaved, False)
    if offsets is None:
        turns = table[: q.shape[1], None]
    else:
        turns = table[offsets.unsqueeze(1) + torch.arange(q.shape[1], device=q.device)].unsqueeze(2)
    cosine, sine = turns.chunk(2, -1)
    return _turn(q, cosine, sine, interleaved), _turn(k, cosine, sine, interleaved)


def _turn(x: Tensor, cosine: Tensor, sine: Tensor, interleaved: bool) -> Tensor:
    wide = x.to(cosine.dtype)
    first, second = (wide[..., ::2], wide[..., 1::2]) if interleaved else wide.chunk(2, -1)
    turned = [first * cosine - second * sine, second * cosine + first * sine]
    return (torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)).to(x.dtype)


def check(q: Tensor, k: Tensor, table: Tensor, offsets: Tensor | None = None) -> None:
    """Raise ValueError for what `rope` does not take."""
    fits = q.dim() == k.dim() == 4 and q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3] and q.dtype == k.dtype
    fits = fits and q.shape[3] % 2 == 0 and table.dim() == 2 and table.shape[1] == q.shape[3]
    fits = fits and q.is_floating_point() and table.dtype in (torch.float32, torch.float64)
    if not fits or table.shape[0] < q.shape[1]:
        raise ValueError(
            f"q {list(q.shape)} {q.dtype}, k {list(k.shape)} {k.dtype}, table {list(table.shape)} {table.dtype}: need "
            "[B, S, N, D], [B, S, K, D] of one floating dtype and [P, D] of at least fp32 with an even D and P >= S"
        )
    if offsets is None:
        return
    if offsets.shape != q.shape[:1] or offsets.dtype != torch.int64:
        raise ValueError(f"offsets {list(offsets.shape)} {offsets.dtype}: need int64 [{q.shape[0]}]")
    most = table.shape[0] - q.shape[1]
    readable = offsets.device.type == "cpu" and offsets.numel() and not torch.compiler.is_compiling()
    if readable and not 0 <= int(offsets.min()) <= int(offsets.max()) <= most:
        raise ValueError(f"offsets {offsets.tolist()}: need 0 to {most}, {q.shape[1]} positions before the table's end")


# -------------------------------------------------------------------------------------------------------------- kernels


@device_function
def _turn_head(
    x, out, exists, cosine, sine,
    INTERLEAVED: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One head. x, out: addresses [ROWS, 1] of its rows' first channels; cosine, sine [ROWS, HALF]."""
    if INTERLEAVED:
        channels = tl.arange(0, 2 * HALF)[None, :]
        mask = exists & (channels < CHANNELS)
        pairs = tl.load(x + channels, mask=mask, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(pairs, [ROWS, HALF, 2]))
        turned = tl.join(first * cosine - second * sine, second * cosine + first * sine)
        turned = tl.reshape(turned, [ROWS, 2 * HALF])
        tl.store(out + channels, cast(turned, out.dtype.element_ty), mask=mask)
    else:
        channels = tl.arange(0, HALF)[None, :]
        mask = exists & (channels < CHANNELS // 2)
        first = tl.load(x + channels, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(x + CHANNELS // 2 + channels, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + channels, cast(first * cosine - second * sine, out.dtype.element_ty), mask=mask)
        turned = cast(second * cosine + first * sine, out.dtype.element_ty)
        tl.store(out + CHANNELS // 2 + channels, turned, mask=mask)


@triton.jit(
    launch_metadata=tells(lambda args: 3.0 * (args["q"].numel() + args["k"].numel())),
    do_not_specialize=["num_rows", "length"],
)
def rope_kernel(
    q, k, q_out, k_out, table, offsets, num_rows, length, q_heads, k_heads, q_stride, k_stride,
    INVERSE: tl.constexpr, INTERLEAVED: tl.constexpr, IN_PLACE: tl.constexpr,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """q_out, k_out, contiguous; IN_PLACE: q and k. Grid: tiles of rows; each reads its part of the table once, for all
    heads. An element is written by whoever read its pair, after both were read."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    exists = rows < num_rows
    positions = (rows % length).to(tl.int64)
    if offsets is not None:
        positions += tl.load(offsets + rows // length, mask=exists, other=0)
    channels = tl.arange(0, HALF)[None, :]
    mask = exists & (channels < CHANNELS // 2)
    turns = table + positions * CHANNELS + channels
    cosine = tl.load(turns, mask=mask, other=0.0).to(tl.float32)
    sine = tl.load(turns + CHANNELS // 2, mask=mask, other=0.0).to(tl.float32)
    if INVERSE:
        sine = -sine
    rows = rows.to(tl.int64)
    q += rows * q_stride
    q_out += rows * q_stride if IN_PLACE else rows * q_heads * CHANNELS
    for _ in range(q_heads):
        _turn_head(q, q_out, exists, cosine, sine, INTERLEAVED, CHANNELS, ROWS, HALF)
        q += CHANNELS
        q_out += CHANNELS
    k += rows * k_stride
    k_out += rows * k_stride if IN_PLACE else rows * k_heads * CHANNELS
    for _ in range(k_heads):
        _turn_head(k, k_out, exists, cosine, sine, INTERLEAVED, CHANNELS, ROWS, HALF)
        k += CHANNELS
        k_out += CHANNELS


# ------------------------------------------------------------------------------------------------------------- launches


def launch(
    q: Tensor, k: Tensor, q_out: Tensor, k_out: Tensor, table: Tensor, offsets: Tensor | None, interleaved: bool,
    inverse: bool,
) -> Launch:  # fmt: skip
    """q [B, S, N, D] and k [B, S, K, D], turned into q_out and k_out of their shapes, contiguous."""
    rows = {"q": matrix(q), "k": matrix(k), "q_out": q_out, "k_out": k_out}
    return _launch(rows, (q.shape[2], k.shape[2]), q.shape[1], table, offsets, interleaved, inverse, in_place=False)


def launch_in_place(qkv: Tensor, table: Tensor, heads: int, kv_heads: int, length: int, inverse: bool) -> Launch:
    """qkv as `rope_in_place_op`'s."""
    q, k, _ = qkv.split([n * table.shape[1] for n in (heads, kv_heads, kv_heads)], 1)
    rows = {"q": q, "k": k, "q_out": q, "k_out": k}
    return _launch(rows, (heads, kv_heads), length, table, None, False, inverse, in_place=True)


def _launch(
    matrices: dict[str, Tensor], heads: tuple[int, int], length: int, table: Tensor, offsets: Tensor | None,
    interleaved: bool, inverse: bool, in_place: bool,
) -> Launch:  # fmt: skip
    """matrices: q, k, q_out, k_out as [rows, heads * channels]."""
    num_rows, channels = len(matrices["q"]), table.shape[1]
    half = next_power_of_2(channels // 2)
    rows = max(1, TILE // (2 * half))
    arguments = {
        **matrices, "table": table, "offsets": offsets, "num_rows": num_rows, "length": length,
        "q_heads": heads[0], "k_heads": heads[1],
        "q_stride": matrices["q"].stride(0), "k_stride": matrices["k"].stride(0),
        "INVERSE": inverse, "INTERLEAVED": interleaved, "IN_PLACE": in_place,
        "CHANNELS": channels, "ROWS": rows, "HALF": half,
    }  # fmt: skip
    return Launch(rope_kernel, (num_tiles(num_rows, rows),), arguments, warps=WARPS, stages=1)


# ------------------------------------------------------------------------------------------------------------ operators


@custom_op("megapar::rope")
def rope_op(
    q: Tensor, k: Tensor, table: Tensor, offsets: Tensor | None, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    """(q, k) turned, or turned back (inverse), contiguous; arguments checked by `rope`."""
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    if q_out.numel() + k_out.numel():
        offsets = None if offsets is None else offsets.contiguous()
        launch(q, k, q_out, k_out, table.contiguous(), offsets, interleaved, inverse).run()
    return q_out, k_out


@custom_op("megapar::rope_in_place", mutates_args=("qkv",))
def rope_in_place_op(qkv: Tensor, table: Tensor, heads: int, kv_heads: int, length: int, inverse: bool) -> None:
    """Turn q and k, or turn them back, where they are: qkv [T, (N + 2 K) D] has q's heads in its first columns, then
    k's, then v's; a row's columns lie together. Row t is position t % length. Not differentiable: a gradient is turned
    by a call of its own, see `attention/fused.py`, which checks the arguments."""
    if qkv.numel():
        launch_in_place(qkv, table.contiguous(), heads, kv_heads, length, inverse).run()


@rope_op.register_fake
def _(q, k, table, offsets, interleaved, inverse):
    return q.new_empty(q.shape), k.new_empty(k.shape)


@rope_in_place_op.register_fake
def _(qkv, table, heads, kv_heads, length, inverse):
    pass


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, table, offsets, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(table, offsets)


def _backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    return *call(rope_op, dq, dk, *ctx.saved_tensors, ctx.interleaved, not ctx.inverse), None, None, None, None


rope_op.register_autograd(_backward, setup_context=_save)


# ----------------------------------------------------------------------------------------------------------- inspection


def aot_specs(arch: str) -> dict[str, Launch]:
    """The launches by name for Llama-8B's and the demo's heads, on tensors without storage."""
    specs = {}
    for sizes in (LLAMA, DEMO):
        heads, kv_heads, channels, dtype = sizes.heads, sizes.kv_heads, sizes.head_dim, sizes.torch_dtype
        with torch.device("meta"):
            qkv = torch.empty(4096, (heads + 2 * kv_heads) * channels, dtype=dtype)
            q, k, _ = qkv.view(1, 4096, -1, channels).split((heads, kv_heads, kv_heads), 2)
            table, offsets = torch.empty(4096, channels), torch.empty(1, dtype=torch.int64)
        for name, interleaved in (("half", False), ("interleaved", True)):
            specs[f"rope_{name}_d{channels}"] = launch(q, k, q, k, table, offsets, interleaved, False)
        specs[f"rope_in_place_d{channels}"] = launch_in_place(qkv, table, heads, kv_heads, 4096, False)
    return specs


KERNEL = Kernel("rope", specs=aot_specs, place=4)
