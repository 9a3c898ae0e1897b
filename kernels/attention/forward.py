"""Attention's forward kernel. An argument that is None is a constant: without a softcap or packed sequences their
code is not compiled."""

from megapar.kernels._common import (
    LN_2,
    cast,
    device_function,
    dot,
    load_full_tile,
    load_tile,
    store_tile,
    tl,
    triton,
)
from megapar.kernels.attention.tiles import (
    VARYING,
    biased,
    cap,
    edge,
    factors,
    metadata,
    num_edges,
    place,
    ranges,
    sees,
)


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


@triton.jit(launch_metadata=metadata(1, 1), do_not_specialize=VARYING)
def attention_forward_kernel(
    q, k, v, k_tiles, v_tiles, o, lse,
    starts_q, starts_k, scale, softcap, q_stride, k_stride, v_stride, bias, bias_queries, bias_keys,
    total_q, len_q, len_k, left, right, num_sequences, group,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS queries of one head: o [T, N*E] and lse [N, T]. Grid: tiles, N, sequences (packed: 1)."""
    first_q, len_q, first_k, len_k, tile = place(starts_q, starts_k, len_q, len_k, num_sequences, starts_q, ROWS)
    if starts_q is None:
        tile = tl.num_programs(0) - 1 - tile  # under a causal mask the last tiles are the longest: they start first
    start = tile * ROWS
    if start >= len_q:
        return
    head = tl.program_id(1)
    kv_head = head // group
    end_q, end_k = first_q + len_q, first_k + len_k
    shift = len_k - len_q
    plain_scale = scale
    inner, scale = factors(scale, softcap)
    q_tile = load_tile(q, first_q + start, head * D, q_stride, end_q, ROWS, D, BLOCK_D)
    rows = start + tl.arange(0, ROWS)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.full([ROWS], 0.0, tl.float32)
    acc = tl.full([ROWS, BLOCK_E], 0.0, tl.float32)
    low, full_low, full_high, high = ranges(start, shift, left, right, len_k, ROWS, STEP, EDGE)

    for index in tl.range(0, num_edges(low, full_low, full_high, high, EDGE), num_stages=1):
        n = edge(index, low, full_low, full_high, EDGE)
        k_tile = load_tile(k, first_k + n, kv_head * D, k_stride, end_k, EDGE, D, BLOCK_D)
        s = cap(dot(q_tile, k_tile.T, None, PRECISION), inner, softcap)
        s = biased(s, bias, head, start, n, plain_scale, bias_queries, bias_keys, ROWS, EDGE)
        keys = n + tl.arange(0, EDGE)
        s = tl.where(sees(rows[:, None], keys[None, :], shift, left, right, len_k), s, float("-inf"))
        p, m, total, decay = _softmax(s, m, total, scale, True)
        v_tile = load_tile(v, first_k + n, kv_head * E, v_stride, end_k, EDGE, E, BLOCK_E)
        acc = dot(cast(p, v_tile.dtype), v_tile, acc * decay[:, None], PRECISION)

    if STEP > 0 and full_low < full_high:
        # The product with v runs one tile behind, so that a tensor core multiplies it while this tile's softmax is
        # computed. p is carried in fp32: cast before it is carried, Triton would take it through shared memory.
        k_tile = load_full_tile(k, k_tiles, first_k + full_low, kv_head * D, k_stride, STEP, D, BLOCK_D)
        s = cap(dot(q_tile, k_tile.T, None, PRECISION), inner, softcap)
        s = biased(s, bias, head, start, full_low, plain_scale, bias_queries, bias_keys, ROWS, STEP)
        p, m, total, decay = _softmax(s, m, total, scale, False)
        for n in tl.range(full_low + STEP, full_high, STEP):
            weights = cast(p, v.dtype.element_ty)
            k_tile = load_full_tile(k, k_tiles, first_k + n, kv_head * D, k_stride, STEP, D, BLOCK_D)
            s = dot(q_tile, k_tile.T, None, PRECISION)
            v_tile = load_full_tile(v, v_tiles, first_k + n - STEP, kv_head * E, v_stride, STEP, E, BLOCK_E)
            acc = dot(weights, v_tile, acc * decay[:, None], PRECISION)
            s = cap(s, inner, softcap)
            s = biased(s, bias, head, start, n, plain_scale, bias_queries, bias_keys, ROWS, STEP)
            p, m, total, decay = _softmax(s, m, total, scale, False)
        v_tile = load_full_tile(v, v_tiles, first_k + full_high - STEP, kv_head * E, v_stride, STEP, E, BLOCK_E)
        acc = dot(cast(p, v_tile.dtype), v_tile, acc * decay[:, None], PRECISION)

    empty = total == 0.0
    o_stride = tl.num_programs(1) * E
    total = tl.where(empty, 1.0, total)
    store_tile(o, acc / total[:, None], first_q + start, head * E, o_stride, end_q, ROWS, E, BLOCK_E)
    lse += tl.cast(head, tl.int64) * total_q + first_q
    tl.store(lse + rows, tl.where(empty, float("-inf"), (m + tl.log2(total)) * LN_2), mask=rows < len_q)
