"""Attention of one matrix that has q, k and v beside each other, as a fused projection leaves them, with their rotary
positions: q and k are turned where they are, and the gradient is one matrix, which nobody puts together.

Both are one function of autograd: a gradient may be turned back where it is only by who has just made it.

Shape letters: T = B * S rows, of B samples of S positions; N query heads, K key/value heads, D channels,
W = (N + 2 K) D columns: those of q's heads, then k's, then v's.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from megapar.kernels import rope as rotary
from megapar.kernels._common import FARTHEST, matrix, target_arch
from megapar.kernels._operators import call, custom_op
from megapar.kernels.attention import attention, attention_bias_backward_op, attention_op, settle
from megapar.kernels.attention.launch import Call

Sizes = tuple[int, int, int]  # N, K, S


def fused_attention_(
    qkv: Tensor,
    heads: int,
    kv_heads: int,
    length: int,
    *,
    table: Tensor | None = None,
    starts: Tensor | None = None,
    causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    """Attention of qkv [T, W]: [T, N D] in its dtype. heads: N, kv_heads: K, length: S.

    table: [P, D] of `rope_table`; q and k are first turned by the positions of their rows in the samples. None: not
    starts: int32 [sequences + 1], where packed sequences begin: `attention`'s cu_seqlens, and the other options are its
        own too. None: every sample is one
    recompute: nothing but qkv is kept for backward, which attends again

    qkv is given up: with a table Triton's form turns q and k in it. A leaf or a view, whose place autograd needs, and
    what lies apart in memory is copied first. Triton's gradients can be differentiated no further. Raises ValueError
    for other shapes and dtypes, and as `rope` and `attention` do.
    """
    fits = qkv.dim() == 2 and min(heads, kv_heads, length) > 0
    if not fits or qkv.shape[1] % (heads + 2 * kv_heads) or len(qkv) % length:
        counts = f"{heads} + 2 x {kv_heads} heads, samples of {length}"
        raise ValueError(f"qkv {list(qkv.shape)} of {counts}: need [T, W], multiples of both")
    sizes = heads, kv_heads, length
    seen = qkv.detach()
    if table is not None:
        q, k, _ = _parts(seen, sizes)
        rotary.check(q, k, table)
    parts = _parts(seen, sizes, starts)
    backend, (*settings, _) = settle(*parts, (starts, starts), causal, window, scale, softcap, bias)
    if backend == "torch" or torch.compiler.is_compiling():  # it traces no function that writes to its input
        attend = partial(
            attention, cu_seqlens_q=starts, cu_seqlens_k=starts, causal=causal, window=window, scale=scale,
            softcap=softcap, bias=bias,
        )  # fmt: skip
        return _of_parts(attend, qkv, sizes, table, starts, recompute)
    if table is not None and not _is_own(qkv):
        qkv = qkv.clone(memory_format=torch.contiguous_format)
    o, *_ = _FusedAttention.apply(qkv, bias, table, starts, sizes, settings, recompute)
    return _matrix_of(o)


def _of_parts(
    attend: Any, qkv: Tensor, sizes: Sizes, table: Tensor | None, starts: Tensor | None, recompute: bool
) -> Tensor:
    """Of functions that make new q and k, in any form."""
    q, k, v = _parts(qkv, sizes)
    if table is not None:
        q, k = rotary.rope(q, k, table)
    if starts is not None:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    if recompute:
        return _matrix_of(checkpoint(attend, q, k, v, use_reentrant=False, preserve_rng_state=False))
    return _matrix_of(attend(q, k, v))


def _parts(qkv: Tensor, sizes: Sizes, starts: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Views of q [B, S, N, D], k and v [B, S, K, D], with starts [T, ., D]."""
    heads, kv_heads, length = sizes
    by_head = qkv.unflatten(1, (heads + 2 * kv_heads, qkv.shape[1] // (heads + 2 * kv_heads)))
    if starts is None:
        by_head = by_head.unflatten(0, (len(qkv) // length, length))
    q, k, v = by_head.split([heads, kv_heads, kv_heads], -2)
    return q, k, v


def _matrix_of(o: Tensor) -> Tensor:
    return o.flatten(-2).flatten(0, -2)


def _is_own(qkv: Tensor) -> bool:
    """Whether kernels and autograd let it be written to where it is."""
    needed = qkv.requires_grad and (qkv.is_leaf or qkv._is_view())
    return not needed and qkv.stride(1) == 1 and qkv.shape[1] <= qkv.stride(0) <= FARTHEST


class _FusedAttention(torch.autograd.Function):
    """(o,), and with a table (o, qkv with q and k turned)."""

    @staticmethod
    def forward(ctx, qkv, bias, table, starts, sizes, settings, recompute):
        ctx.set_materialize_grads(False)
        if table is not None:
            call(rotary.rope_in_place_op, qkv, table, *sizes, False)
            ctx.mark_dirty(qkv)
        o, lse = call(attention_op, *_parts(qkv, sizes, starts), starts, starts, *settings, bias)
        ctx.save_for_backward(qkv, bias, table, starts, *((None, None) if recompute else (o, lse)))
        ctx.sizes, ctx.settings = sizes, settings
        return (o,) if table is None else (o, qkv)

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dturned=None):
        qkv, bias, table, starts, o, lse = ctx.saved_tensors
        parts, settings = _parts(qkv, ctx.sizes, starts), (*ctx.settings, bias)
        if o is None:
            o, lse = call(attention_op, *parts, starts, starts, *settings)
        do = torch.zeros_like(o) if do is None else do
        gradient = call(fused_attention_backward_op, do, qkv, o, lse, starts, *ctx.sizes, *settings)
        dbias = None
        if ctx.needs_input_grad[1]:
            dbias = call(attention_bias_backward_op, do, None, *parts, o, lse, starts, starts, *settings)
        if dturned is not None:  # of who used qkv afterwards
            gradient += dturned
        if table is not None:
            call(rotary.rope_in_place_op, gradient, table, *ctx.sizes, True)
        return gradient, dbias, None, None, None, None, None


@custom_op("megapar::fused_attention_backward")
def fused_attention_backward_op(
    do: Tensor,
    qkv: Tensor,
    o: Tensor,
    lse: Tensor,
    starts: Tensor | None,
    heads: int,
    kv_heads: int,
    length: int,
    scale: float,
    left: int,
    right: int,
    softcap: float | None,
    bias: Tensor | None,
) -> Tensor:
    """The gradient [T, W], contiguous, of qkv as `attention_op` got its parts, from that of its o. The same bits every
    time."""
    sizes = heads, kv_heads, length
    call = Call.of(*_parts(qkv, sizes, starts), starts, starts, scale, left, right, softcap, bias)
    gradient = qkv.new_empty(qkv.shape)
    if starts is not None or not call.useful:  # rows that belong to no sequence
        gradient.zero_()
    if call.useful:
        arch, do = target_arch(), matrix(do.contiguous())
        dq, dk, dv = gradient.split([n * call.D for n in (heads, kv_heads, kv_heads)], 1)
        statistics = lse.new_empty(2, *lse.shape)
        call.statistics(arch, matrix(o), do, lse, None, statistics).run()
        call.dkdv(arch, do, statistics, dk, dv, fused=True).run()
        call.dq(arch, do, statistics, dq, fused=True).run()
    return gradient


@fused_attention_backward_op.register_fake
def _(do, qkv, *rest):
    return qkv.new_empty(qkv.shape)
