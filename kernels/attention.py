"""Scaled dot-product attention with grouped query heads, windows and packed sequences.

`attention` is the contract. Then come its form in torch, the Triton kernels, their launches with the table of block
sizes, and the two operators that torch sees.

The kernels follow FlashAttention-2 (Dao 2023): scores exist one tile at a time, the softmax is taken on the way, and
the backward computes them again from the log-sum-exp. Each loop has two parts. Full tiles, which every row of the
program sees whole, need no mask at all and are read by TMA where the machine has it. Boundary tiles, where the window,
the diagonal or a sequence ends, are smaller and masked element by element.

Shape letters: B samples, S query positions, L key positions, T all positions of packed sequences, N query heads,
K key/value heads, D channels of q and k, E channels of v.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from megapar.kernels import backend_of
from megapar.kernels._common import (
    LN_2,
    LOG2_E,
    Launch,
    cast,
    device_function,
    dot,
    find_sequence,
    floating,
    load_full_tile,
    load_tile,
    matrix,
    next_power_of_2,
    num_tiles,
    precision,
    relative,
    sequence_rows,
    store_tile,
    target_arch,
    tiles_of,
    tl,
    triton,
)

# Arguments whose values must not become part of a compilation: they change from batch to batch.
VARYING = ["total_q", "len_q", "len_k", "left", "right", "num_sequences", "group"]
WIDEST = 256  # channels of a head
UNLIMITED = 1 << 30  # a side of a window that reaches everything; positions are fewer


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
    return_lse: bool = False,
) -> Any:
    """softmax(scale * q k^T) v per head.

    q [B, S, N, D], k [B, L, K, D], v [B, L, K, E] in one floating dtype; N is a multiple of K, and query head n reads
    kv head n // (N / K). Query i stands at key i + L - S: the last query beside the last key.
    causal: a query sees no key behind its place
    window: (left, right): it sees so many keys before its place and so many behind it, None: any number
    cu_seqlens_q, cu_seqlens_k: int32 [sequences + 1], where each of the packed sequences in q [T, N, D] and in
        k, v [T', K, .] begins, and the end of the last: 0 first, then never less, at most T. Sequences may be empty.
        Give both or neither. On a GPU nothing checks the numbers: the kernels cut each to 0 and T, so that wrong ones
        give wrong results and no access outside the tensors
    scale: positive, 1/sqrt(D) by default; softcap: scores become softcap * tanh(scores / softcap)

    Returns [B, S, N, E] (packed: [T, N, E]) in q's dtype. With return_lse also the natural logarithm of the softmax's
    denominator, fp32 (fp64 for fp64), of the same shape without E, differentiable too, for `merge_attention`.
    A query that sees no key gets 0 and -inf, and gradients of 0.

    Softmax and sums in fp32 or wider. Raises ValueError for arguments that contradict each other, and where the
    backend that was asked for can't run. The Triton gradients can be differentiated no further.
    """
    left, right = _window(causal, window)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, softcap)
    backend = backend_of("attention", q.device.type, q.dtype)
    for starts, rows in ((cu_seqlens_q, len(q)), (cu_seqlens_k, len(k))):
        if starts is not None and (backend == "torch" or starts.device.type == "cpu"):
            _check_starts(starts, rows)
    if backend == "torch":
        if cu_seqlens_q is not None and cu_seqlens_k is not None:
            return _packed(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, left, right, softcap, return_lse)
        return _dense(q, k, v, scale, left, right, softcap, return_lse)
    if max(q.shape[-1], v.shape[-1]) > WIDEST:
        heads = f"heads of {q.shape[-1]} and {v.shape[-1]} channels"
        raise ValueError(f"{heads}: the kernels take up to {WIDEST}; use kernels.backend=torch")
    o, lse = attention_op(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, left, right, softcap)
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


def _check_starts(starts: Tensor, rows: int) -> None:
    """Called where it costs no wait for a GPU."""
    if torch.compiler.is_compiling():
        return
    ends = starts.tolist()
    if ends != sorted(ends) or ends[0] != 0 or ends[-1] > rows:
        raise ValueError(f"cu_seqlens {ends}: need 0 first, then numbers that never fall, of at most {rows}")


# ---------------------------------------------------------------------------------------------------- plain torch


def _dense(
    q: Tensor, k: Tensor, v: Tensor, scale: float, left: int, right: int, softcap: float | None, return_lse: bool
) -> Any:
    """Attention in plain differentiable torch: q [B, S, N, D], k [B, L, K, D], v [B, L, K, E]."""
    batch, length, heads, channels = q.shape
    keys, groups, width = k.shape[1], k.shape[2], v.shape[3]
    # One batched matmul per kv head: the query heads that share it are stacked along the rows.
    q = q.view(batch, length, groups, heads // groups, channels).permute(0, 2, 3, 1, 4)
    q = q.reshape(batch * groups, heads // groups * length, channels)
    k = k.transpose(1, 2).reshape(batch * groups, keys, channels)
    v = v.transpose(1, 2).reshape(batch * groups, keys, width)
    scores = torch.bmm(q * scale, k.transpose(1, 2)).view(batch * groups, heads // groups, length, keys)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    if softcap is not None:
        scores = softcap * torch.tanh(scores.to(wide) / softcap)
    hidden, empty = _hidden(length, keys, left, right, q.device)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -math.inf)
    if empty is not None:  # softmax over no key would be NaN
        scores = scores.masked_fill(empty, 0.0)
    weights = torch.softmax(scores, -1, dtype=wide).to(q.dtype)
    if empty is not None:
        weights = weights.masked_fill(empty, 0.0)
    out = torch.bmm(weights.view(batch * groups, heads // groups * length, keys), v)
    out = out.view(batch, groups, heads // groups, length, width)
    out = out.permute(0, 3, 1, 2, 4).reshape(batch, length, heads, width)
    if not return_lse:
        return out
    scores = scores.to(wide)  # over no key there is a sum, 0, and no largest
    lse = torch.logsumexp(scores, -1, keepdim=True) if keys else scores.sum(-1, keepdim=True)
    if empty is not None:
        lse = lse.masked_fill(empty, -math.inf)
    return out, lse.view(batch, heads, length).transpose(1, 2)


def _hidden(length: int, keys: int, left: int, right: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """(which keys a query does not see [S, L], which queries see none [S, 1]); None where there are no such."""
    shift, hidden = keys - length, None
    if keys == 0:
        return None, torch.ones(length, 1, dtype=torch.bool, device=device)
    if right < length - 1:
        hidden = torch.ones(length, keys, dtype=torch.bool, device=device).triu(shift + right + 1)
    if left < keys - 1:
        before = torch.ones(length, keys, dtype=torch.bool, device=device).tril(shift - left - 1)
        hidden = before if hidden is None else hidden | before
    return hidden, hidden.all(-1, keepdim=True) if hidden is not None and shift + right < 0 else None


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    left: int,
    right: int,
    softcap: float | None,
    return_lse: bool,
) -> Any:
    """Packed sequences in plain torch, one after another: q [T, N, D], k [T', K, D], v [T', K, E]."""
    ends_q, ends_k = cu_q.tolist(), cu_k.tolist()
    parts = [
        _dense(q[None, a:b], k[None, c:d], v[None, c:d], scale, left, right, softcap, True)
        for (a, b), (c, d) in zip(pairwise(ends_q), pairwise(ends_k), strict=True)
    ]
    outs, lses = [out[0] for out, _ in parts], [lse[0] for _, lse in parts]
    rest = len(q) - ends_q[-1]  # rows behind the last sequence
    outs.append(q.new_zeros(rest, q.shape[1], v.shape[2]))
    lses.append(torch.full((rest, q.shape[1]), -math.inf, dtype=lses[0].dtype, device=q.device))
    out = torch.cat(outs)
    return (out, torch.cat(lses)) if return_lse else out


# -------------------------------------------------------------------------------------------------------------- kernels
# An argument that is None is a constant: without a softcap or packed sequences their code is not compiled.


def _visible_pairs(args: dict[str, Any]) -> float:
    """(query, key) pairs of one head that are seen. Of packed sequences it reads the lengths: only a profiler asks."""
    left, right = args["left"], args["right"]
    if args["starts_q"] is None:
        lengths = [(args["len_q"], args["len_k"])] * args["num_sequences"]
    else:
        ends_q, ends_k = args["starts_q"].tolist(), args["starts_k"].tolist()
        lengths = [(b - a, d - c) for (a, b), (c, d) in zip(pairwise(ends_q), pairwise(ends_k), strict=True)]
    seen = 0
    for len_q, len_k in lengths:
        shift = len_k - len_q
        seen += sum(max(0, min(len_k, i + shift + right + 1) - max(0, i + shift - left)) for i in range(len_q))
    return seen


def _metadata(matmuls_d: int, matmuls_e: int) -> Any:
    """Triton's launch_metadata: useful FLOPs and least bytes of a launch, from matmuls over D and over E channels."""

    def describe(grid: Any, kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
        heads = args["q"].shape[1] // args["D"]
        flops = 2.0 * (matmuls_d * args["D"] + matmuls_e * args["E"]) * heads * _visible_pairs(args)
        return {"name": kernel.name, f"flops{8 * args['q'].element_size()}": flops, "bytes": _bytes(args)}

    return describe


def _statistics_metadata(grid: Any, kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
    return {"name": kernel.name, "flops32": 2.0 * args["o"].numel(), "bytes": _bytes(args)}


def _bytes(args: dict[str, Any]) -> int:
    """Every tensor once."""
    return sum(x.numel() * x.element_size() for x in args.values() if isinstance(x, Tensor))


@device_function
def _place(starts_q, starts_k, len_q, len_k, num_sequences, starts, ROWS: tl.constexpr):
    """(first q row, q length, first k row, k length, tile) of this program's sequence.

    starts: those of starts_q and starts_k over whose tiles the grid goes; None: all sequences have the same lengths,
    len_q and len_k, which otherwise are those of all sequences together
    """
    if starts is None:
        sequence = tl.program_id(2)
        return sequence * len_q, len_q, sequence * len_k, len_k, tl.program_id(0)
    else:
        sequence, tile = find_sequence(starts, num_sequences, ROWS)
        first_q, len_q = sequence_rows(starts_q, sequence, len_q)
        first_k, len_k = sequence_rows(starts_k, sequence, len_k)
        return first_q, len_q, first_k, len_k, tile


@device_function
def _ranges(start, shift, before, after, length, ROWS: tl.constexpr, STEP: tl.constexpr, EDGE: tl.constexpr):
    """What the rows [start, start + ROWS) see of a sequence of this length, where row i sees the places from
    i + shift - before to i + shift + after: (low, full_low, full_high, high).

    Some row sees something of [low, high); every row sees all of [full_low, full_high), a multiple of STEP wide.
    low and full_low are multiples of EDGE. No full tile, as with STEP = 0: full_low = full_high = low.
    """
    low = tl.maximum(start + shift - before, 0) // EDGE * EDGE
    high = tl.minimum(start + ROWS + shift + after, length)
    if STEP == 0:
        return low, low, low, high
    full_low = (tl.maximum(start + ROWS - 1 + shift - before, 0) + EDGE - 1) // EDGE * EDGE
    full = tl.maximum(tl.minimum(start + shift + after + 1, length) - full_low, 0) // STEP * STEP
    full_low = tl.where(full == 0, low, full_low)
    return low, full_low, full_low + full, high


@device_function
def _num_edges(low, full_low, full_high, high, EDGE: tl.constexpr):
    """How many boundary tiles lie in [low, full_low) and [full_high, high)."""
    return (full_low - low) // EDGE + (tl.maximum(high - full_high, 0) + EDGE - 1) // EDGE


@device_function
def _edge(index, low, full_low, full_high, EDGE: tl.constexpr):
    """Where boundary tile `index` begins: first those before the full tiles, then those behind."""
    before = (full_low - low) // EDGE
    return tl.where(index < before, low + index * EDGE, full_high + (index - before) * EDGE)


@device_function
def _sees(query, key, shift, left, right, len_k):
    """Whether a query sees a key, elementwise, broadcast."""
    distance = key - query - shift
    return (key < len_k) & (distance <= right) & (distance >= -left)


@device_function
def _factors(scale, softcap):
    """(factor inside the tanh, factor to scores in units of log 2)."""
    if softcap is None:
        return 1.0, scale * LOG2_E
    else:
        return 2.0 * LOG2_E * scale / softcap, softcap * LOG2_E


@device_function
def _cap(s, inner, softcap):
    """tanh, the score in units of softcap; without a softcap s as it is."""
    if softcap is not None:
        s = 1.0 - 2.0 / (1.0 + tl.exp2(s * inner))
    return s


@device_function
def _softmax(s, m, total, scale, BOUNDARY: tl.constexpr):
    """One step of the online softmax: (weights p, highest score m, sum of weights, what older sums are to be times)."""
    highest = tl.maximum(m, tl.max(s, 1) * scale)
    base = highest
    if BOUNDARY:  # a row may have seen nothing yet: -inf minus -inf
        base = tl.where(highest == float("-inf"), 0.0, highest)
    p = tl.exp2(s * scale - base[:, None])
    decay = tl.exp2(m - base)
    return p, highest, total * decay + tl.sum(p, 1), decay


@triton.jit(launch_metadata=_metadata(1, 1), do_not_specialize=VARYING)
def attention_forward_kernel(
    q, k, v, k_tiles, v_tiles, o, lse,
    starts_q, starts_k, scale, softcap, q_stride, k_stride, v_stride,
    total_q, len_q, len_k, left, right, num_sequences, group,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS queries of one head: o [T, N*E] and lse [N, T]. Grid: tiles, N, sequences (packed: 1)."""
    first_q, len_q, first_k, len_k, tile = _place(starts_q, starts_k, len_q, len_k, num_sequences, starts_q, ROWS)
    if starts_q is None:
        tile = tl.num_programs(0) - 1 - tile  # under a causal mask the last tiles are the longest: they start first
    start = tile * ROWS
    if start >= len_q:
        return
    head = tl.program_id(1)
    kv_head = head // group
    end_q, end_k = first_q + len_q, first_k + len_k
    shift = len_k - len_q
    inner, scale = _factors(scale, softcap)
    q_tile = load_tile(q, first_q + start, head * D, q_stride, end_q, ROWS, D, BLOCK_D)
    rows = start + tl.arange(0, ROWS)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.full([ROWS], 0.0, tl.float32)
    acc = tl.full([ROWS, BLOCK_E], 0.0, tl.float32)
    low, full_low, full_high, high = _ranges(start, shift, left, right, len_k, ROWS, STEP, EDGE)

    for index in tl.range(0, _num_edges(low, full_low, full_high, high, EDGE), num_stages=1):
        n = _edge(index, low, full_low, full_high, EDGE)
        k_tile = load_tile(k, first_k + n, kv_head * D, k_stride, end_k, EDGE, D, BLOCK_D)
        s = _cap(dot(q_tile, k_tile.T, None, PRECISION), inner, softcap)
        keys = n + tl.arange(0, EDGE)
        s = tl.where(_sees(rows[:, None], keys[None, :], shift, left, right, len_k), s, float("-inf"))
        p, m, total, decay = _softmax(s, m, total, scale, True)
        v_tile = load_tile(v, first_k + n, kv_head * E, v_stride, end_k, EDGE, E, BLOCK_E)
        acc = dot(cast(p, v_tile.dtype), v_tile, acc * decay[:, None], PRECISION)

    if STEP > 0 and full_low < full_high:
        # The product with v runs one tile behind, so that a tensor core multiplies it while this tile's softmax is
        # computed. p is carried in fp32: cast before it is carried, Triton would take it through shared memory.
        k_tile = load_full_tile(k, k_tiles, first_k + full_low, kv_head * D, k_stride, STEP, D, BLOCK_D)
        s = _cap(dot(q_tile, k_tile.T, None, PRECISION), inner, softcap)
        p, m, total, decay = _softmax(s, m, total, scale, False)
        for n in tl.range(full_low + STEP, full_high, STEP):
            weights = cast(p, v.dtype.element_ty)
            k_tile = load_full_tile(k, k_tiles, first_k + n, kv_head * D, k_stride, STEP, D, BLOCK_D)
            s = dot(q_tile, k_tile.T, None, PRECISION)
            v_tile = load_full_tile(v, v_tiles, first_k + n - STEP, kv_head * E, v_stride, STEP, E, BLOCK_E)
            acc = dot(weights, v_tile, acc * decay[:, None], PRECISION)
            p, m, total, decay = _softmax(_cap(s, inner, softcap), m, total, scale, False)
        v_tile = load_full_tile(v, v_tiles, first_k + full_high - STEP, kv_head * E, v_stride, STEP, E, BLOCK_E)
        acc = dot(cast(p, v_tile.dtype), v_tile, acc * decay[:, None], PRECISION)

    empty = total == 0.0
    o_stride = tl.num_programs(1) * E
    total = tl.where(empty, 1.0, total)
    store_tile(o, acc / total[:, None], first_q + start, head * E, o_stride, end_q, ROWS, E, BLOCK_E)
    lse += tl.cast(head, tl.int64) * total_q + first_q
    tl.store(lse + rows, tl.where(empty, float("-inf"), (m + tl.log2(total)) * LN_2), mask=rows < len_q)


@triton.jit(launch_metadata=_statistics_metadata)
def attention_statistics_kernel(
    o, do, lse, dlse, statistics, total_q, E: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr
):
    """What the backward needs of each query: statistics [2, N, T], from o, do [T, N*E] and lse, dlse [N, T].

    First lse in units of log 2, inf where a query sees nothing, so that its weights exp2(s - inf) are 0. Then
    sum(o * do) - dlse, what is to be taken from the gradient of each weight. Grid: tiles of ROWS, N.
    """
    start, head, heads = tl.program_id(0) * ROWS, tl.program_id(1), tl.num_programs(1)
    rows = start + tl.arange(0, ROWS)
    o_tile = load_tile(o, start, head * E, heads * E, total_q, ROWS, E, BLOCK_E)
    do_tile = load_tile(do, start, head * E, heads * E, total_q, ROWS, E, BLOCK_E)
    at = tl.cast(head, tl.int64) * total_q + rows
    delta = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
    delta -= tl.load(dlse + at, mask=rows < total_q, other=0.0)
    logarithm = tl.load(lse + at, mask=rows < total_q, other=0.0) * LOG2_E
    logarithm = tl.where(logarithm == float("-inf"), float("inf"), logarithm)
    tl.store(statistics + at, logarithm, mask=rows < total_q)
    tl.store(statistics + tl.cast(heads, tl.int64) * total_q + at, delta, mask=rows < total_q)


@device_function
def _weights(s, logarithm, inner, scale, softcap):
    """(scores as `_cap` returns them, weights) from q k^T; logarithm: inf where a query does not see a key."""
    t = _cap(s, inner, softcap)
    return t, tl.exp2(t * scale - logarithm)


@device_function
def _scores_gradient(p, dp, delta, t, softcap):
    """Gradient of the scaled scores before the softcap, from the weights, dp = do v^T and the capped scores."""
    ds = p * (dp - delta)
    if softcap is not None:
        ds = ds * (1.0 - t * t)
    return ds


@triton.jit(launch_metadata=_metadata(2, 2), do_not_specialize=VARYING)
def attention_dkdv_kernel(
    q, k, v, do, q_tiles, do_tiles, statistics, dk, dv,
    starts_q, starts_k, scale, softcap, q_stride, k_stride, v_stride,
    total_q, len_q, len_k, left, right, num_sequences, group,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS keys of one kv head: dk [T', K*D], dv [T', K*E]. Grid: tiles, K, sequences (packed: 1).

    It goes over the queries of every head that reads this one, in order: no atomics, and the same bits every time.
    Scores are kept transposed, [keys, queries], so that they are operands of both products from registers.
    """
    first_q, len_q, first_k, len_k, tile = _place(starts_q, starts_k, len_q, len_k, num_sequences, starts_k, ROWS)
    start = tile * ROWS
    if start >= len_k:
        return
    kv_head = tl.program_id(1)
    end_q, end_k = first_q + len_q, first_k + len_k
    shift = len_k - len_q
    inner, scale_2 = _factors(scale, softcap)
    do_stride = tl.num_programs(1) * group * E
    k_tile = load_tile(k, first_k + start, kv_head * D, k_stride, end_k, ROWS, D, BLOCK_D)
    v_tile = load_tile(v, first_k + start, kv_head * E, v_stride, end_k, ROWS, E, BLOCK_E)
    keys = start + tl.arange(0, ROWS)
    dk_acc = tl.full([ROWS, BLOCK_D], 0.0, tl.float32)
    dv_acc = tl.full([ROWS, BLOCK_E], 0.0, tl.float32)
    # Key j is seen by the queries from j - shift - right to j - shift + left.
    low, full_low, full_high, high = _ranges(start, -shift, right, left, len_q, ROWS, STEP, EDGE)

    # One loop over the boundary tiles of all heads and one over the full ones: a loop in a loop would fill its pipeline
    # anew for every head, and keep the addresses of both alive.
    total = tl.cast(tl.num_programs(1) * group, tl.int64) * total_q
    edges = _num_edges(low, full_low, full_high, high, EDGE)
    for index in tl.range(0, group * edges, num_stages=1):
        head = kv_head * group + index // edges
        m = _edge(index % edges, low, full_low, full_high, EDGE)
        rows = m + tl.arange(0, EDGE)
        q_tile = load_tile(q, first_q + m, head * D, q_stride, end_q, EDGE, D, BLOCK_D)
        do_tile = load_tile(do, first_q + m, head * E, do_stride, end_q, EDGE, E, BLOCK_E)
        at = statistics + tl.cast(head, tl.int64) * total_q + first_q + rows
        logarithm = tl.load(at, mask=rows < len_q, other=float("inf"))
        delta = tl.load(at + total, mask=rows < len_q, other=0.0)
        seen = _sees(rows[None, :], keys[:, None], shift, left, right, len_k)
        logarithm = tl.where(seen, logarithm[None, :], float("inf"))
        s = dot(k_tile, q_tile.T, None, PRECISION)
        dp = dot(v_tile, do_tile.T, None, PRECISION)
        t, p = _weights(s, logarithm, inner, scale_2, softcap)
        dv_acc = dot(cast(p, do_tile.dtype), do_tile, dv_acc, PRECISION)
        ds = _scores_gradient(p, dp, delta[None, :], t, softcap)
        dk_acc = dot(cast(ds, q_tile.dtype), q_tile, dk_acc, PRECISION)

    # What is loaded where is chosen with care: a load among the products makes the compiler wait for them.
    tiles = (full_high - full_low) // STEP
    head, row = kv_head * group, first_q + full_low
    for _ in tl.range(0, group * tiles):
        at = statistics + tl.cast(head, tl.int64) * total_q + row + tl.arange(0, STEP)
        q_tile = load_full_tile(q, q_tiles, row, head * D, q_stride, STEP, D, BLOCK_D)
        do_tile = load_full_tile(do, do_tiles, row, head * E, do_stride, STEP, E, BLOCK_E)
        logarithm = tl.load(at)[None, :]
        s = dot(k_tile, q_tile.T, None, PRECISION)
        dp = dot(v_tile, do_tile.T, None, PRECISION)
        t, p = _weights(s, logarithm, inner, scale_2, softcap)
        dv_acc = dot(cast(p, do_tile.dtype), do_tile, dv_acc, PRECISION)
        ds = _scores_gradient(p, dp, tl.load(at + total)[None, :], t, softcap)
        dk_acc = dot(cast(ds, q_tile.dtype), q_tile, dk_acc, PRECISION)
        row += STEP
        if row >= first_q + full_high:
            head += 1
            row = first_q + full_low

    dk_stride, dv_stride = tl.num_programs(1) * D, tl.num_programs(1) * E
    store_tile(dk, dk_acc * scale, first_k + start, kv_head * D, dk_stride, end_k, ROWS, D, BLOCK_D)
    store_tile(dv, dv_acc, first_k + start, kv_head * E, dv_stride, end_k, ROWS, E, BLOCK_E)


@device_function
def _dq_step(q_tile, do_tile, k_tile, v_tile, logarithm, delta, dq, inner, scale, softcap, PRECISION: tl.constexpr):
    """dq with what one tile of keys adds."""
    s = dot(q_tile, k_tile.T, None, PRECISION)
    dp = dot(do_tile, v_tile.T, None, PRECISION)
    t, p = _weights(s, logarithm, inner, scale, softcap)
    ds = _scores_gradient(p, dp, delta[:, None], t, softcap)
    return dot(cast(ds, k_tile.dtype), k_tile, dq, PRECISION)


@triton.jit(launch_metadata=_metadata(2, 1), do_not_specialize=VARYING)
def attention_dq_kernel(
    q, k, v, do, k_tiles, v_tiles, statistics, dq,
    starts_q, starts_k, scale, softcap, q_stride, k_stride, v_stride,
    total_q, len_q, len_k, left, right, num_sequences, group,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS queries of one head: dq [T, N*D]. Grid: tiles, N, sequences (packed: 1)."""
    first_q, len_q, first_k, len_k, tile = _place(starts_q, starts_k, len_q, len_k, num_sequences, starts_q, ROWS)
    if starts_q is None:
        tile = tl.num_programs(0) - 1 - tile  # the longest first, as in the forward
    start = tile * ROWS
    if start >= len_q:
        return
    head = tl.program_id(1)
    kv_head = head // group
    end_q, end_k = first_q + len_q, first_k + len_k
    shift = len_k - len_q
    inner, scale_2 = _factors(scale, softcap)
    do_stride = tl.num_programs(1) * E
    q_tile = load_tile(q, first_q + start, head * D, q_stride, end_q, ROWS, D, BLOCK_D)
    do_tile = load_tile(do, first_q + start, head * E, do_stride, end_q, ROWS, E, BLOCK_E)
    rows = start + tl.arange(0, ROWS)
    statistics += tl.cast(head, tl.int64) * total_q + first_q + rows
    logarithm = tl.load(statistics, mask=rows < len_q, other=float("inf"))
    delta = tl.load(statistics + tl.cast(tl.num_programs(1), tl.int64) * total_q, mask=rows < len_q, other=0.0)
    acc = tl.full([ROWS, BLOCK_D], 0.0, tl.float32)
    low, full_low, full_high, high = _ranges(start, shift, left, right, len_k, ROWS, STEP, EDGE)

    for index in tl.range(0, _num_edges(low, full_low, full_high, high, EDGE), num_stages=1):
        n = _edge(index, low, full_low, full_high, EDGE)
        keys = n + tl.arange(0, EDGE)
        k_tile = load_tile(k, first_k + n, kv_head * D, k_stride, end_k, EDGE, D, BLOCK_D)
        v_tile = load_tile(v, first_k + n, kv_head * E, v_stride, end_k, EDGE, E, BLOCK_E)
        seen = _sees(rows[:, None], keys[None, :], shift, left, right, len_k)
        hiding = tl.where(seen, logarithm[:, None], float("inf"))
        acc = _dq_step(q_tile, do_tile, k_tile, v_tile, hiding, delta, acc, inner, scale_2, softcap, PRECISION)

    for n in tl.range(full_low, full_high, STEP):
        k_tile = load_full_tile(k, k_tiles, first_k + n, kv_head * D, k_stride, STEP, D, BLOCK_D)
        v_tile = load_full_tile(v, v_tiles, first_k + n, kv_head * E, v_stride, STEP, E, BLOCK_E)
        acc = _dq_step(
            q_tile, do_tile, k_tile, v_tile, logarithm[:, None], delta, acc, inner, scale_2, softcap, PRECISION
        )

    dq_stride = tl.num_programs(1) * D
    store_tile(dq, acc * scale, first_q + start, head * D, dq_stride, end_q, ROWS, D, BLOCK_D)


# ------------------------------------------------------------------------------------------------------------- launches


@dataclass(frozen=True)
class Config:
    """Block sizes of one kernel: rows that a program owns, full and boundary tiles of its loop; warps, stages, TMA.

    step: 0, in the forward only: all tiles are masked as the boundary's. One loop needs fewer registers than two.
    """

    rows: int
    step: int
    edge: int
    warps: int
    stages: int
    tma: bool = False


# (kernel, architecture, widest head) -> Config for 16-bit tensors, chosen by what the compiler makes of them:
# docs/kernels.md has the figures. sm_80's fit into the 99 KB of its smaller relatives.
CONFIGS = {
    ("forward", "sm_80", 64): Config(128, 64, 32, 8, 2),
    ("forward", "sm_80", 128): Config(128, 32, 32, 8, 3),
    ("forward", "sm_80", 256): Config(64, 0, 64, 8, 1),
    ("forward", "sm_90", 64): Config(128, 128, 64, 8, 2, tma=True),
    ("forward", "sm_90", 96): Config(128, 64, 64, 8, 2, tma=True),
    ("forward", "sm_90", 128): Config(128, 128, 64, 8, 2, tma=True),
    ("forward", "sm_90", 256): Config(128, 64, 32, 8, 2, tma=True),
    ("forward", "sm_100", 64): Config(128, 128, 64, 8, 2, tma=True),
    ("forward", "sm_100", 96): Config(128, 128, 64, 8, 3, tma=True),
    ("forward", "sm_100", 128): Config(128, 128, 64, 8, 2, tma=True),
    ("forward", "sm_100", 256): Config(128, 64, 32, 8, 2, tma=True),
    ("forward", "gfx942", 128): Config(128, 64, 32, 8, 2),
    ("forward", "gfx942", 256): Config(64, 32, 16, 4, 1),
    ("forward", "interpret", 256): Config(128, 128, 64, 4, 1),
    ("dkdv", "sm_80", 64): Config(128, 32, 32, 8, 2),
    ("dkdv", "sm_80", 128): Config(64, 32, 16, 4, 2),
    ("dkdv", "sm_80", 256): Config(32, 32, 16, 4, 1),
    ("dkdv", "sm_90", 64): Config(128, 64, 64, 8, 2, tma=True),
    ("dkdv", "sm_90", 96): Config(128, 32, 32, 8, 2, tma=True),
    ("dkdv", "sm_90", 128): Config(128, 64, 32, 8, 2, tma=True),
    ("dkdv", "sm_90", 256): Config(64, 32, 16, 8, 2, tma=True),
    ("dkdv", "sm_100", 128): Config(128, 64, 32, 8, 2, tma=True),
    ("dkdv", "sm_100", 256): Config(64, 32, 16, 8, 2, tma=True),
    ("dkdv", "gfx942", 128): Config(64, 32, 16, 4, 2),
    ("dkdv", "gfx942", 256): Config(32, 32, 16, 4, 1),
    ("dkdv", "interpret", 256): Config(128, 128, 64, 4, 1),
    ("dq", "sm_80", 64): Config(128, 64, 32, 8, 2),
    ("dq", "sm_80", 128): Config(128, 32, 16, 8, 2),
    ("dq", "sm_80", 256): Config(32, 32, 16, 4, 1),
    ("dq", "sm_90", 64): Config(128, 128, 64, 8, 2, tma=True),
    ("dq", "sm_90", 96): Config(128, 64, 32, 8, 2, tma=True),
    ("dq", "sm_90", 128): Config(128, 128, 64, 8, 2, tma=True),
    ("dq", "sm_90", 256): Config(64, 32, 16, 4, 2, tma=True),
    ("dq", "sm_100", 128): Config(128, 64, 64, 8, 2, tma=True),
    ("dq", "sm_100", 256): Config(64, 32, 16, 4, 2, tma=True),
    ("dq", "gfx942", 128): Config(128, 32, 16, 4, 2),
    ("dq", "gfx942", 256): Config(32, 32, 16, 4, 1),
    ("dq", "interpret", 256): Config(128, 128, 64, 4, 1),
    # fp32 on any GPU: three tf32 products for one need small tiles, or registers spill.
    ("forward", "fp32", 32): Config(64, 32, 16, 4, 2),
    ("forward", "fp32", 64): Config(32, 16, 16, 4, 1),
    ("forward", "fp32", 128): Config(16, 0, 32, 8, 1),
    ("forward", "fp32", 256): Config(16, 0, 16, 8, 1),
    ("dkdv", "fp32", 64): Config(32, 16, 16, 4, 1),
    ("dkdv", "fp32", 128): Config(16, 16, 16, 8, 1),
    ("dkdv", "fp32", 256): Config(16, 16, 16, 4, 1),
    ("dq", "fp32", 32): Config(64, 32, 16, 4, 2),
    ("dq", "fp32", 64): Config(32, 16, 16, 4, 1),
    ("dq", "fp32", 256): Config(16, 16, 16, 4, 1),
}
STATISTICS_ROWS = 32


def config_of(kernel: str, arch: str, channels: int, dtype: torch.dtype) -> Config:
    """The block sizes that a launch takes, by the wider of a head's D and E."""
    if dtype == torch.float32 and arch != "interpret":
        arch = "fp32"
    elif ("forward", arch, 256) not in CONFIGS:
        arch = relative(arch)
    return CONFIGS[kernel, arch, min(c for k, a, c in CONFIGS if (k, a) == (kernel, arch) and c >= channels)]


@dataclass(frozen=True)
class Call:
    """The tensors of one call as matrices [rows, heads * channels], and what every kernel is told about them."""

    q: Tensor
    k: Tensor
    v: Tensor
    starts_q: Tensor | None
    starts_k: Tensor | None
    heads: int
    kv_heads: int
    D: int
    E: int
    num_sequences: int
    len_q: int  # of every sequence; of packed ones all rows
    len_k: int
    scale: float
    left: int
    right: int
    softcap: float | None

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor | None, starts_k: Tensor | None,
        scale: float, left: int, right: int, softcap: float | None,
    ) -> "Call":  # fmt: skip
        packed = starts_q is not None
        starts_q, starts_k = (None if x is None else x.contiguous() for x in (starts_q, starts_k))
        return cls(
            matrix(q), matrix(k), matrix(v), starts_q, starts_k, q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1],
            len(starts_q) - 1 if starts_q is not None else q.shape[0],
            q.shape[0 if packed else 1], k.shape[0 if packed else 1], scale, left, right, softcap,
        )  # fmt: skip

    @property
    def useful(self) -> bool:
        """Whether any query can see any key, so that there is something to launch."""
        return self.q.numel() > 0 and self.k.numel() > 0 and self.num_sequences > 0

    def launch(self, name: str, kernel: Any, arch: str, streamed: dict[str, Tensor], **tensors: Tensor) -> Launch:
        """A launch of the forward, dkdv or dq kernel. streamed: the matrices that its loop reads, by name."""
        config = config_of(name, arch, max(self.D, self.E), self.q.dtype)
        over_keys = name == "dkdv"
        rows, starts = (self.k, self.starts_k) if over_keys else (self.q, self.starts_q)
        length, heads = (self.len_k, self.kv_heads) if over_keys else (self.len_q, self.heads)
        block_d, block_e = next_power_of_2(self.D), next_power_of_2(self.E)
        blocks = {"q": block_d, "k": block_d, "v": block_e, "do": block_e}
        tiles = {f"{x}_tiles": tiles_of(streamed[x], config.step, blocks[x]) if config.tma else None for x in streamed}
        if block_d != self.D or block_e != self.E or None in tiles.values():
            tiles = dict.fromkeys(tiles)  # a tile wider than a head would reach into the next one
        arguments = {
            "q": self.q, "k": self.k, "v": self.v, **tensors, **tiles,
            "starts_q": self.starts_q, "starts_k": self.starts_k,
            "scale": self.scale, "softcap": self.softcap, "q_stride": self.q.stride(0), "k_stride": self.k.stride(0),
            "v_stride": self.v.stride(0), "total_q": len(self.q), "len_q": self.len_q, "len_k": self.len_k,
            "left": self.left, "right": self.right, "num_sequences": self.num_sequences,
            "group": self.heads // self.kv_heads, "D": self.D, "E": self.E, "BLOCK_D": block_d, "BLOCK_E": block_e,
            "ROWS": config.rows, "STEP": config.step, "EDGE": config.edge, "PRECISION": precision(arch),
        }  # fmt: skip
        if starts is None:
            grid = (num_tiles(length, config.rows), heads, self.num_sequences)
        else:
            grid = (len(rows) // config.rows + self.num_sequences + 1, heads, 1)
        return Launch(kernel, grid, arguments, config.warps, config.stages)

    def forward(self, arch: str, o: Tensor, lse: Tensor) -> Launch:
        streamed = {"k": self.k, "v": self.v}
        return self.launch("forward", attention_forward_kernel, arch, streamed, o=o, lse=lse)

    def statistics(self, arch: str, o: Tensor, do: Tensor, lse: Tensor, dlse: Tensor, statistics: Tensor) -> Launch:
        tensors = {"o": o, "do": do, "lse": lse, "dlse": dlse, "statistics": statistics}
        sizes = {"total_q": len(o), "E": self.E, "BLOCK_E": next_power_of_2(self.E), "ROWS": STATISTICS_ROWS}
        return Launch(
            attention_statistics_kernel, (num_tiles(len(o), STATISTICS_ROWS), self.heads), tensors | sizes, 4, 1
        )

    def dkdv(self, arch: str, do: Tensor, statistics: Tensor, dk: Tensor, dv: Tensor) -> Launch:
        streamed = {"q": self.q, "do": do}
        return self.launch("dkdv", attention_dkdv_kernel, arch, streamed, do=do, statistics=statistics, dk=dk, dv=dv)

    def dq(self, arch: str, do: Tensor, statistics: Tensor, dq: Tensor) -> Launch:
        streamed = {"k": self.k, "v": self.v}
        return self.launch("dq", attention_dq_kernel, arch, streamed, do=do, statistics=statistics, dq=dq)


# -------------------------------------------------------------------------------------------------------- operators


@torch.library.custom_op("megapar::attention", mutates_args=())
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
) -> tuple[Tensor, Tensor]:
    """(o [B, S, N, E] or [T, N, E], lse [N, B*S] or [N, T] in fp32), contiguous; arguments checked by `attention`."""
    call = Call.of(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, left, right, softcap)
    o, lse = _outputs(q, v)
    if cu_seqlens_q is not None or not call.useful:  # rows that belong to no sequence
        o.zero_()
        lse.fill_(-math.inf)
    if call.useful:
        call.forward(target_arch(), matrix(o), lse).run()
    return o, lse


def _outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    rows = math.prod(q.shape[:-2])
    return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[-2], rows, dtype=torch.float32)


@torch.library.custom_op("megapar::attention_backward", mutates_args=())
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
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), contiguous, from the gradients of both outputs of `attention_op`. The same bits every time."""
    call = Call.of(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, left, right, softcap)
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


@attention_op.register_fake
def _(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, left, right, softcap):
    return _outputs(q, v)


@attention_backward_op.register_fake
def _(do, dlse, q, k, v, *rest):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:5])
    ctx.settings = inputs[5:]


def _backward(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    gradients = attention_backward_op(do, dlse, *ctx.saved_tensors, *ctx.settings)
    return *gradients, *(None,) * 6


attention_op.register_autograd(_backward, setup_context=_save)


# ------------------------------------------------------------------------------------------------------- inspection

# name -> (dtype, N, K, D): what the launches are compiled for where no GPU is; `megapar kernels` shows the result
MODELS = {
    "llama-8b": (torch.bfloat16, 32, 8, 128),
    "gpt2": (torch.bfloat16, 12, 12, 64),
    "demo": (torch.float32, 4, 2, 32),
}


def aot_specs(arch: str) -> dict[str, Launch]:
    """The launches of MODELS by name, on tensors without storage, as the operators make them on a GPU of this kind."""
    specs: dict[str, Launch] = {}
    for dtype, heads, kv_heads, channels in MODELS.values():
        specs |= aot_launches(arch, dtype, heads, kv_heads, channels)
    dtype, heads, kv_heads, channels = MODELS["llama-8b"]
    return specs | aot_launches(arch, dtype, heads, kv_heads, channels, packed=True)


def aot_launches(
    arch: str,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    channels: int,
    packed: bool = False,
    softcap: float | None = None,
) -> dict[str, Launch]:
    """The launches of one attention layer: causal over 2 x 4096 tokens, or packed sequences with a window."""
    with torch.device("meta"):
        shape = (8192,) if packed else (2, 4096)
        q, k, v = (torch.empty(*shape, n, channels, dtype=dtype) for n in (heads, kv_heads, kv_heads))
        starts = torch.empty(9, dtype=torch.int32) if packed else None
        o, lse = _outputs(q, v)
        statistics = lse.new_empty(2, *lse.shape)
    call = Call.of(q, k, v, starts, starts, channels**-0.5, 1024 if packed else UNLIMITED, 0, softcap)
    do, o = matrix(o), matrix(o)
    size = f"d{channels}" + ("_packed" if packed else "") + ("_softcap" if softcap else "")
    launches = {
        f"attention_fwd_{size}" + ("" if packed else "_causal"): call.forward(arch, o, lse),
        f"attention_dkdv_{size}": call.dkdv(arch, do, statistics, matrix(k), matrix(v)),
        f"attention_dq_{size}": call.dq(arch, do, statistics, matrix(q)),
    }
    if not packed:
        launches[f"attention_statistics_{size}"] = call.statistics(arch, o, do, lse, lse, statistics)
    return launches
