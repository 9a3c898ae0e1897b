"""Attention's Triton kernels; `kernels/attention.py` says what they compute, and launches them.

They follow FlashAttention-2 (Dao 2023): scores exist one tile at a time, the softmax is taken on the way, and the
backward computes them again from the log-sum-exp. Each loop has two parts. Full tiles, which every row of the program
sees whole, need no mask at all and are read by TMA where the machine has it. Boundary tiles, where the window, the
diagonal or a sequence ends, are smaller and masked element by element.

Shape letters: T query positions of all sequences, N query heads, K key/value heads, D channels of q and k, E of v.
An argument that is None is a constant: without a softcap or packed sequences their code is not compiled.
"""

from itertools import pairwise
from typing import Any

from torch import Tensor

from megapar.kernels._common import (
    LN_2,
    LOG2_E,
    cast,
    device_function,
    dot,
    find_sequence,
    load_full_tile,
    load_tile,
    store_tile,
    tl,
    triton,
)


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

    starts: those of starts_q and starts_k over whose tiles the grid goes; None: all sequences have the same lengths
    """
    if starts is None:
        sequence = tl.program_id(2)
        return sequence * len_q, len_q, sequence * len_k, len_k, tl.program_id(0)
    else:
        sequence, tile = find_sequence(starts, num_sequences, ROWS)
        first_q, first_k = tl.load(starts_q + sequence), tl.load(starts_k + sequence)
        len_q = tl.load(starts_q + sequence + 1) - first_q
        return first_q, len_q, first_k, tl.load(starts_k + sequence + 1) - first_k, tile


@device_function
def _ranges(start, shift, before, after, length, ROWS: tl.constexpr, STEP: tl.constexpr, EDGE: tl.constexpr):
    """What the rows [start, start + ROWS) see of a sequence of this length, where row i sees the places from
    i + shift - before to i + shift + after: (low, full_low, full_high, high).

    Some row sees something of [low, high); every row sees all of [full_low, full_high), a multiple of STEP wide.
    low and full_low are multiples of EDGE. No full tile: full_low = full_high = low.
    """
    low = tl.maximum(start + shift - before, 0) // EDGE * EDGE
    high = tl.minimum(start + ROWS + shift + after, length)
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


@triton.jit(
    launch_metadata=_metadata(1, 1),
    do_not_specialize=["total_q", "len_q", "len_k", "left", "right", "num_sequences", "group"],
)
def forward_kernel(
    q,
    k,
    v,
    k_tiles,
    v_tiles,
    o,
    lse,
    starts_q,
    starts_k,
    scale,
    softcap,
    q_stride,
    k_stride,
    v_stride,
    total_q,
    len_q,
    len_k,
    left,
    right,
    num_sequences,
    group,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    EDGE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """ROWS queries of one head: o [T, N*E] and lse [N, T]. Grid: tiles, N, sequences (packed: 1)."""
    first_q, len_q, first_k, len_k, tile = _place(starts_q, starts_k, len_q, len_k, num_sequences, starts_q, ROWS)
    if starts_q is None:
        tile = tl.num_programs(0) - 1 - tile  # under a causal mask the last tiles are the longest: they start first
    start = tile * ROWS
    if start >= len_q:
        return
    head = tl.program_id(1)
    kv_head = head // group
    shift = len_k - len_q
    inner, scale = _factors(scale, softcap)
    q += tl.cast(first_q, tl.int64) * q_stride + head * D
    k += tl.cast(first_k, tl.int64) * k_stride + kv_head * D
    v += tl.cast(first_k, tl.int64) * v_stride + kv_head * E
    q_tile = load_tile(q, start, q_stride, len_q, ROWS, D, BLOCK_D)
    rows = start + tl.arange(0, ROWS)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.full([ROWS], 0.0, tl.float32)
    acc = tl.full([ROWS, BLOCK_E], 0.0, tl.float32)
    low, full_low, full_high, high = _ranges(start, shift, left, right, len_k, ROWS, STEP, EDGE)

    for index in tl.range(0, _num_edges(low, full_low, full_high, high, EDGE), num_stages=1):
        n = _edge(index, low, full_low, full_high, EDGE)
        k_tile = load_tile(k, n, k_stride, len_k, EDGE, D, BLOCK_D)
        s = _cap(dot(q_tile, k_tile.T, None, PRECISION), inner, softcap)
        keys = n + tl.arange(0, EDGE)
        s = tl.where(_sees(rows[:, None], keys[None, :], shift, left, right, len_k), s, float("-inf"))
        p, m, total, decay = _softmax(s, m, total, scale, True)
        v_tile = load_tile(v, n, v_stride, len_k, EDGE, E, BLOCK_E)
        acc = dot(cast(p, v_tile.dtype), v_tile, acc * decay[:, None], PRECISION)

    if full_low < full_high:
        # The product with v runs one tile behind, so that a tensor core multiplies it while this tile's softmax is
        # computed. p is carried in fp32: cast before it is carried, Triton would take it through shared memory.
        k_tile = load_full_tile(k, k_tiles, first_k, full_low, kv_head * D, k_stride, STEP, D, BLOCK_D)
        s = _cap(dot(q_tile, k_tile.T, None, PRECISION), inner, softcap)
        p, m, total, decay = _softmax(s, m, total, scale, False)
        for n in tl.range(full_low + STEP, full_high, STEP):
            weights = cast(p, v.dtype.element_ty)
            k_tile = load_full_tile(k, k_tiles, first_k, n, kv_head * D, k_stride, STEP, D, BLOCK_D)
            s = dot(q_tile, k_tile.T, None, PRECISION)
            v_tile = load_full_tile(v, v_tiles, first_k, n - STEP, kv_head * E, v_stride, STEP, E, BLOCK_E)
            acc = dot(weights, v_tile, acc * decay[:, None], PRECISION)
            p, m, total, decay = _softmax(_cap(s, inner, softcap), m, total, scale, False)
        v_tile = load_full_tile(v, v_tiles, first_k, full_high - STEP, kv_head * E, v_stride, STEP, E, BLOCK_E)
        acc = dot(cast(p, v_tile.dtype), v_tile, acc * decay[:, None], PRECISION)

    empty = total == 0.0
    o_stride = tl.num_programs(1) * E
    o += tl.cast(first_q, tl.int64) * o_stride + head * E
    total = tl.where(empty, 1.0, total)
    store_tile(o, acc / total[:, None], start, o_stride, len_q, ROWS, E, BLOCK_E)
    lse += tl.cast(head, tl.int64) * total_q + first_q
    tl.store(lse + rows, tl.where(empty, float("-inf"), (m + tl.log2(total)) * LN_2), mask=rows < len_q)


@triton.jit(launch_metadata=_statistics_metadata)
def statistics_kernel(
    o, do, lse, dlse, statistics, total_q, E: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr
):
    """What the backward needs of each query: statistics [2, N, T], from o, do [T, N*E] and lse, dlse [N, T].

    First lse in units of log 2, inf where a query sees nothing, so that its weights exp2(s - inf) are 0. Then
    sum(o * do) - dlse, what is to be taken from the gradient of each weight. Grid: tiles of ROWS, N.
    """
    start, head, heads = tl.program_id(0) * ROWS, tl.program_id(1), tl.num_programs(1)
    rows = start + tl.arange(0, ROWS)
    o_tile = load_tile(o + head * E, start, heads * E, total_q, ROWS, E, BLOCK_E)
    do_tile = load_tile(do + head * E, start, heads * E, total_q, ROWS, E, BLOCK_E)
    at = tl.cast(head, tl.int64) * total_q + rows
    delta = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
    delta -= tl.load(dlse + at, mask=rows < total_q, other=0.0)
    logarithm = tl.load(lse + at, mask=rows < total_q, other=0.0) * LOG2_E
    logarithm = tl.where(logarithm == float("-inf"), float("inf"), logarithm)
    tl.store(statistics + at, logarithm, mask=rows < total_q)
    tl.store(statistics + tl.cast(heads, tl.int64) * total_q + at, delta, mask=rows < total_q)


@device_function
def _scores_gradient(p, dp, delta, t, softcap):
    """Gradient of the scaled scores before the softcap, elementwise; t: the scores as `_cap` returns them."""
    ds = p * (dp - delta)
    if softcap is not None:
        ds = ds * (1.0 - t * t)
    return ds


@triton.jit(
    launch_metadata=_metadata(2, 2),
    do_not_specialize=["total_q", "len_q", "len_k", "left", "right", "num_sequences", "group"],
)
def dkdv_kernel(
    q,
    k,
    v,
    do,
    q_tiles,
    do_tiles,
    statistics,
    dk,
    dv,
    starts_q,
    starts_k,
    scale,
    softcap,
    q_stride,
    k_stride,
    v_stride,
    total_q,
    len_q,
    len_k,
    left,
    right,
    num_sequences,
    group,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    EDGE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """ROWS keys of one kv head: dk [T', K*D], dv [T', K*E]. Grid: tiles, K, sequences (packed: 1).

    It goes over the queries of every head that reads this one, in order: no atomics, and the same bits every time.
    Scores are kept transposed, [keys, queries], so that they are operands of both products from registers.
    """
    first_q, len_q, first_k, len_k, tile = _place(starts_q, starts_k, len_q, len_k, num_sequences, starts_k, ROWS)
    start = tile * ROWS
    if start >= len_k:
        return
    kv_head = tl.program_id(1)
    shift = len_k - len_q
    inner, scale_2 = _factors(scale, softcap)
    k += tl.cast(first_k, tl.int64) * k_stride + kv_head * D
    v += tl.cast(first_k, tl.int64) * v_stride + kv_head * E
    do_stride = tl.num_programs(1) * group * E
    q += tl.cast(first_q, tl.int64) * q_stride
    do += tl.cast(first_q, tl.int64) * do_stride
    k_tile = load_tile(k, start, k_stride, len_k, ROWS, D, BLOCK_D)
    v_tile = load_tile(v, start, v_stride, len_k, ROWS, E, BLOCK_E)
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
        q_tile = load_tile(q + head * D, m, q_stride, len_q, EDGE, D, BLOCK_D)
        do_tile = load_tile(do + head * E, m, do_stride, len_q, EDGE, E, BLOCK_E)
        at = statistics + tl.cast(head, tl.int64) * total_q + first_q + rows
        logarithm = tl.load(at, mask=rows < len_q, other=float("inf"))
        delta = tl.load(at + total, mask=rows < len_q, other=0.0)
        t = _cap(dot(k_tile, q_tile.T, None, PRECISION), inner, softcap)
        seen = _sees(rows[None, :], keys[:, None], shift, left, right, len_k)
        p = tl.exp2(t * scale_2 - tl.where(seen, logarithm[None, :], float("inf")))
        dv_acc = dot(cast(p, do_tile.dtype), do_tile, dv_acc, PRECISION)
        dp = dot(v_tile, do_tile.T, None, PRECISION)
        ds = _scores_gradient(p, dp, delta[None, :], t, softcap)
        dk_acc = dot(cast(ds, q_tile.dtype), q_tile, dk_acc, PRECISION)

    tiles = (full_high - full_low) // STEP
    head, m = kv_head * group, full_low
    for _ in tl.range(0, group * tiles):
        at = statistics + tl.cast(head, tl.int64) * total_q + first_q + m + tl.arange(0, STEP)
        q_tile = load_full_tile(q + head * D, q_tiles, first_q, m, head * D, q_stride, STEP, D, BLOCK_D)
        s = dot(k_tile, q_tile.T, None, PRECISION)
        do_tile = load_full_tile(do + head * E, do_tiles, first_q, m, head * E, do_stride, STEP, E, BLOCK_E)
        dp = dot(v_tile, do_tile.T, None, PRECISION)
        t = _cap(s, inner, softcap)
        p = tl.exp2(t * scale_2 - tl.load(at)[None, :])
        dv_acc = dot(cast(p, do_tile.dtype), do_tile, dv_acc, PRECISION)
        ds = _scores_gradient(p, dp, tl.load(at + total)[None, :], t, softcap)
        dk_acc = dot(cast(ds, q_tile.dtype), q_tile, dk_acc, PRECISION)
        m += STEP
        if m >= full_high:
            head += 1
            m = full_low

    dk_stride, dv_stride = tl.num_programs(1) * D, tl.num_programs(1) * E
    dk += tl.cast(first_k, tl.int64) * dk_stride + kv_head * D
    dv += tl.cast(first_k, tl.int64) * dv_stride + kv_head * E
    store_tile(dk, dk_acc * scale, start, dk_stride, len_k, ROWS, D, BLOCK_D)
    store_tile(dv, dv_acc, start, dv_stride, len_k, ROWS, E, BLOCK_E)


@triton.jit(
    launch_metadata=_metadata(2, 1),
    do_not_specialize=["total_q", "len_q", "len_k", "left", "right", "num_sequences", "group"],
)
def dq_kernel(
    q,
    k,
    v,
    do,
    k_tiles,
    v_tiles,
    statistics,
    dq,
    starts_q,
    starts_k,
    scale,
    softcap,
    q_stride,
    k_stride,
    v_stride,
    total_q,
    len_q,
    len_k,
    left,
    right,
    num_sequences,
    group,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    EDGE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """ROWS queries of one head: dq [T, N*D]. Grid: tiles, N, sequences (packed: 1)."""
    first_q, len_q, first_k, len_k, tile = _place(starts_q, starts_k, len_q, len_k, num_sequences, starts_q, ROWS)
    if starts_q is None:
        tile = tl.num_programs(0) - 1 - tile  # the longest first, as in the forward
    start = tile * ROWS
    if start >= len_q:
        return
    head = tl.program_id(1)
    kv_head = head // group
    shift = len_k - len_q
    inner, scale_2 = _factors(scale, softcap)
    do_stride = tl.num_programs(1) * E
    q += tl.cast(first_q, tl.int64) * q_stride + head * D
    do += tl.cast(first_q, tl.int64) * do_stride + head * E
    k += tl.cast(first_k, tl.int64) * k_stride + kv_head * D
    v += tl.cast(first_k, tl.int64) * v_stride + kv_head * E
    q_tile = load_tile(q, start, q_stride, len_q, ROWS, D, BLOCK_D)
    do_tile = load_tile(do, start, do_stride, len_q, ROWS, E, BLOCK_E)
    rows = start + tl.arange(0, ROWS)
    statistics += tl.cast(head, tl.int64) * total_q + first_q + rows
    logarithm = tl.load(statistics, mask=rows < len_q, other=float("inf"))
    delta = tl.load(statistics + tl.cast(tl.num_programs(1), tl.int64) * total_q, mask=rows < len_q, other=0.0)
    acc = tl.full([ROWS, BLOCK_D], 0.0, tl.float32)
    low, full_low, full_high, high = _ranges(start, shift, left, right, len_k, ROWS, STEP, EDGE)

    for index in tl.range(0, _num_edges(low, full_low, full_high, high, EDGE), num_stages=1):
        n = _edge(index, low, full_low, full_high, EDGE)
        keys = n + tl.arange(0, EDGE)
        k_tile = load_tile(k, n, k_stride, len_k, EDGE, D, BLOCK_D)
        v_tile = load_tile(v, n, v_stride, len_k, EDGE, E, BLOCK_E)
        t = _cap(dot(q_tile, k_tile.T, None, PRECISION), inner, softcap)
        seen = _sees(rows[:, None], keys[None, :], shift, left, right, len_k)
        p = tl.exp2(t * scale_2 - tl.where(seen, logarithm[:, None], float("inf")))
        dp = dot(do_tile, v_tile.T, None, PRECISION)
        ds = _scores_gradient(p, dp, delta[:, None], t, softcap)
        acc = dot(cast(ds, k_tile.dtype), k_tile, acc, PRECISION)

    for n in tl.range(full_low, full_high, STEP):
        k_tile = load_full_tile(k, k_tiles, first_k, n, kv_head * D, k_stride, STEP, D, BLOCK_D)
        s = dot(q_tile, k_tile.T, None, PRECISION)
        v_tile = load_full_tile(v, v_tiles, first_k, n, kv_head * E, v_stride, STEP, E, BLOCK_E)
        dp = dot(do_tile, v_tile.T, None, PRECISION)
        t = _cap(s, inner, softcap)
        p = tl.exp2(t * scale_2 - logarithm[:, None])
        ds = _scores_gradient(p, dp, delta[:, None], t, softcap)
        acc = dot(cast(ds, k_tile.dtype), k_tile, acc, PRECISION)

    dq_stride = tl.num_programs(1) * D
    dq += tl.cast(first_q, tl.int64) * dq_stride + head * D
    store_tile(dq, acc * scale, start, dq_stride, len_q, ROWS, D, BLOCK_D)
