"""Scaled dot-product attention with grouped query heads, windows, packed sequences and an additive bias.

`attention` is the contract; the three operators that torch sees follow it. Its form in torch is in `plain`, the Triton
kernels are in `forward` and `backward` with what they share in `tiles`, their launches and the table of block sizes in
`launch`. `fused` has the same of one matrix of q, k and v, with their rotary positions.

The kernels follow FlashAttention-2 (Dao 2023): scores exist one tile at a time, the softmax is taken on the way, and
the backward computes them again from the log-sum-exp. Each loop has two parts. Full tiles, which every row of the
program sees whole, need no mask at all and are read by TMA where the machine has it. Boundary tiles, where the window,
the diagonal or a sequence ends, are smaller and masked element by element.

Shape letters: B samples, S query positions, L key positions, T all positions of packed sequences, N query heads,
K key/value heads, D channels of q and k, E channels of v.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from megapar.kernels import backend_of
from megapar.kernels._common import floating, matrix, target_arch
from megapar.kernels._operators import call, custom_op
from megapar.kernels.attention.launch import UNLIMITED, Call, aot_specs, outputs
from megapar.kernels.attention.plain import dense, packed
from megapar.kernels.registry import Kernel

WIDEST = 256  # channels of a head

# scale, keys before and behind a query's place that it sees, softcap, bias
Settings = tuple[float, int, int, float | None, Tensor | None]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """softmax(scale * q k^T + bias) v per head.

    q [B, S, N, D], k [B, L, K, D], v [B, L, K, E] in one floating dtype; N is a multiple of K, and query head n reads
    kv head n // (N / K). Query i stands at key i + L - S: the last query beside the last key.
    causal: a query sees no key behind its place
    window: (left, right): it sees `left` keys before its place and `right` behind it, None: any number
    cu_seqlens_q, cu_seqlens_k: int32 [sequences + 1], where each of the packed sequences in q [T, N, D] and in
        k, v [T', K, .] begins, and the end of the last: 0 first, then never less, at most T. Sequences may be empty.
        Give both or neither. On a GPU nothing checks the numbers: the kernels cut each to 0 and T, so that wrong ones
        give wrong results and no access outside the tensors
    scale: positive, 1/sqrt(D) by default; softcap: scores become softcap * tanh(scores / softcap), without a bias
    bias: [N, S, L] in a floating dtype, the same for every sample, differentiable. Of packed sequences, whose positions
        count from their own beginning, at least as long as the longest of them; on a GPU nothing checks that, and
        where it has no element it is 0

    Returns [B, S, N, E] (packed: [T, N, E]) in q's dtype. With return_lse also the natural logarithm of the softmax's
    denominator, fp32 (fp64 for fp64), of the same shape without E, differentiable too, for `merge_attention`.
    A query that sees no key gets 0 and -inf, and gradients of 0.

    Softmax and sums in fp32 or wider. Raises ValueError for arguments that contradict each other, and where the
    backend that was asked for can't run. The Triton gradients can be differentiated no further.
    """
    starts = cu_seqlens_q, cu_seqlens_k
    backend, settings = settle(q, k, v, starts, causal, window, scale, softcap, bias)
    if backend == "torch":
        if cu_seqlens_q is not None and cu_seqlens_k is not None:
            return packed(q, k, v, cu_seqlens_q, cu_seqlens_k, *settings, return_lse)
        return dense(q, k, v, *settings, return_lse)
    o, lse = call(attention_op, q, k, v, *starts, *settings)
    if not return_lse:
        return o
    return o, lse.view(lse.shape[0], *q.shape[:-2]).movedim(0, -1)


def merge_attention(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the keys of both, from attention over the keys of each: (o, lse), for ring attention.

    o1, o2 [..., N, E] and lse1, lse2 [..., N] as `attention` returns them. Differentiable; -inf on either side or on
    both is no key there. Raises ValueError for integers.
    """
    if not floating(o1, lse1, o2, lse2):
        raise ValueError(f"o {o1.dtype}, {o2.dtype}, lse {lse1.dtype}, {lse2.dtype}: need floating dtypes")
    highest = torch.maximum(lse1, lse2).detach()
    highest = highest.masked_fill(highest == -math.inf, 0.0)
    weight1, weight2 = torch.exp(lse1 - highest), torch.exp(lse2 - highest)
    total = weight1 + weight2
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    o = (o1 * (weight1 / total).unsqueeze(-1) + o2 * (weight2 / total).unsqueeze(-1)).to(o1.dtype)
    return o, (highest + torch.log(total)).masked_fill(empty, -math.inf)


def settle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: tuple[Tensor | None, Tensor | None],
    causal: bool,
    window: tuple[int | None, int | None] | None,
    scale: float | None,
    softcap: float | None,
    bias: Tensor | None = None,
) -> tuple[str, "Settings"]:
    """(backend, settings) of a call of `attention`, whose cu_seqlens are `starts`. Raises ValueError as it does."""
    left, right = _window(causal, window)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    _check(q, k, v, *starts, scale, softcap)
    if bias is not None:
        _check_bias(q, k, starts, softcap, bias)
    backend = backend_of("attention", q.device.type, q.dtype)
    for place, (numbers, rows) in enumerate(zip(starts, (len(q), len(k)), strict=True)):
        if numbers is not None and (backend == "torch" or numbers.device.type == "cpu"):
            _check_starts(numbers, rows, None if bias is None else bias.shape[1 + place])
    if backend != "torch" and max(q.shape[-1], v.shape[-1]) > WIDEST:
        heads = f"heads of {q.shape[-1]} and {v.shape[-1]} channels"
        raise ValueError(f"{heads}: the kernels take up to {WIDEST}; use kernels.backend=torch")
    return backend, (scale, left, right, softcap, bias)


def _window(causal: bool, window: tuple[int | None, int | None] | None) -> tuple[int, int]:
    """Keys before and behind a query's place that it sees."""
    sides = (None, None) if window is None else window
    pair = isinstance(sides, Sequence) and len(sides) == 2
    if not pair or not all(side is None or (isinstance(side, int) and side >= 0) for side in sides):
        raise ValueError(f"window={window}: two whole numbers of at least 0, None for no limit")
    left, right = (UNLIMITED if side is None else min(side, UNLIMITED) for side in sides)
    return left, 0 if causal else right


def _check(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, scale: float, softcap: float | None
) -> None:
    dims, shapes = 4 if cu_q is None else 3, f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if (cu_q is None) != (cu_k is None):
        raise ValueError("cu_seqlens_q and cu_seqlens_k: give both, or neither")
    if {q.dim(), k.dim(), v.dim()} != {dims}:
        raise ValueError(f"{shapes}: need {dims} dimensions each, {'batched' if cu_q is None else 'packed'}")
    if k.shape[:-1] != v.shape[:-1] or k.shape[-1] != q.shape[-1] or (cu_q is None and k.shape[0] != q.shape[0]):
        raise ValueError(f"{shapes}: k and v must have the same positions and heads, q and k the same channels")
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(f"{shapes}: query heads must be a multiple of kv heads")
    if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
        raise ValueError(f"dtypes {q.dtype}, {k.dtype}, {v.dtype}: need one floating dtype")
    if cu_q is not None and cu_k is not None and (cu_q.shape != cu_k.shape or cu_q.dim() != 1 or len(cu_q) < 2):
        raise ValueError("cu_seqlens_q and cu_seqlens_k: need [sequences + 1] each, for the same sequences")
    if cu_q is not None and cu_k is not None and not cu_q.dtype == cu_k.dtype == torch.int32:
        raise ValueError(f"cu_seqlens_q and cu_seqlens_k are {cu_q.dtype}, {cu_k.dtype}; use int32")
    if scale <= 0 or (softcap is not None and softcap <= 0):
        raise ValueError(f"scale={scale}, softcap={softcap}: must be positive")


def _check_bias(
    q: Tensor, k: Tensor, starts: tuple[Tensor | None, Tensor | None], softcap: float | None, bias: Tensor
) -> None:
    if softcap is not None:
        raise ValueError(f"softcap={softcap} and a bias: no model has both; give one of them")
    whole = starts[0] is not None or bias.shape[1:] == (q.shape[1], k.shape[1])
    if bias.dim() != 3 or len(bias) != q.shape[-2] or not bias.is_floating_point() or not whole:
        needed = f"[{q.shape[-2]}, S, L]" if starts[0] is not None else f"[{q.shape[-2]}, {q.shape[1]}, {k.shape[1]}]"
        raise ValueError(f"bias {list(bias.shape)} {bias.dtype}: need {needed} in a floating dtype")


def _check_starts(starts: Tensor, rows: int, longest: int | None) -> None:
    """Called where it costs no wait for a GPU. longest: the most that a sequence may have."""
    if torch.compiler.is_compiling():
        return
    ends = starts.tolist()
    if ends != sorted(ends) or ends[0] != 0 or ends[-1] > rows:
        raise ValueError(f"cu_seqlens {ends}: need 0 first, then numbers that never fall, of at most {rows}")
    if longest is not None and max(b - a for a, b in pairwise(ends)) > longest:
        raise ValueError(f"cu_seqlens {ends}: a sequence is longer than the {longest} positions of the bias")


# -------------------------------------------------------------------------------------------------------- operators


@custom_op("megapar::attention")
def attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    left: int,
    right: int,
    softcap: float | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(o [B, S, N, E] or [T, N, E], lse [N, B*S] or [N, T] in fp32), contiguous; arguments checked by `attention`."""
    call = Call.of(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, left, right, softcap, bias)
    o, lse = outputs(q, v)
    if cu_seqlens_q is not None or not call.useful:  # rows that belong to no sequence
        o.zero_()
        lse.fill_(-math.inf)
    if call.useful:
        call.forward(target_arch(), matrix(o), lse).run()
    return o, lse


@custom_op("megapar::attention_backward")
def attention_backward_op(
    do: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    left: int,
    right: int,
    softcap: float | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), contiguous, from the gradients of both outputs of `attention_op`. The same bits every time."""
    call = Call.of(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, left, right, softcap, bias)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    if cu_seqlens_q is not None or not call.useful:
        for gradient in (dq, dk, dv):
            gradient.zero_()
    if call.useful:
        arch, do = target_arch(), matrix(do.contiguous())
        statistics = lse.new_empty(2, *lse.shape)
        call.statistics(arch, matrix(o), do, lse, dlse.contiguous(), statistics).run()
        call.dkdv(arch, do, statistics, matrix(dk), matrix(dv)).run()
        call.dq(arch, do, statistics, matrix(dq)).run()
    return dq, dk, dv


@custom_op("megapar::attention_bias_backward")
def attention_bias_backward_op(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    left: int,
    right: int,
    softcap: float | None,
    bias: Tensor,
) -> Tensor:
    """The bias's gradient [N, S, L] in its dtype, contiguous, summed over samples. dlse: None for zeros. The same bits
    every time."""
    call = Call.of(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, left, right, softcap, bias)
    dbias = torch.empty_like(bias, memory_format=torch.contiguous_format)
    if not call.useful or not bias.numel():
        return dbias.zero_()
    arch, do = target_arch(), matrix(do.contiguous())
    statistics = lse.new_empty(2, *lse.shape)
    call.statistics(arch, matrix(o), do, lse, None if dlse is None else dlse.contiguous(), statistics).run()
    call.dbias(arch, do, statistics, dbias).run()
    return dbias


@attention_op.register_fake
def _(q, k, v, *rest):
    return outputs(q, v)


@attention_backward_op.register_fake
def _(do, dlse, q, k, v, *rest):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


@attention_bias_backward_op.register_fake
def _(*arguments):
    return torch.empty_like(arguments[-1], memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *settings, bias = inputs[5:]
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:5], bias)
    ctx.settings = settings


def _backward(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, bias = ctx.saved_tensors
    given = (do, dlse, *tensors, *ctx.settings, bias)
    gradients = call(attention_backward_op, *given)
    dbias = call(attention_bias_backward_op, *given) if ctx.needs_input_grad[-1] else None
    return *gradients, *(None,) * 6, dbias


attention_op.register_autograd(_backward, setup_context=_save)


KERNEL = Kernel("attention", specs=aot_specs, place=1)
