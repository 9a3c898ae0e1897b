"""Attention's backward kernels: what each query contributes to all (statistics), dK with dV, dQ, and the bias's."""

from typing import Any

from megapar.kernels._common import (
    LOG2_E,
    cast,
    device_function,
    dot,
    load_full_tile,
    load_tile,
    sequence_rows,
    store_tile,
    tl,
    triton,
)
from megapar.kernels.attention.tiles import (
    VARYING,
    biased,
    bytes_of,
    cap,
    edge,
    factors,
    metadata,
    num_edges,
    place,
    ranges,
    sees,
)


def _statistics_metadata(grid: Any, kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
    return {"name": kernel.name, "flops32": 2.0 * args["o"].numel(), "bytes": bytes_of(args)}


@triton.jit(launch_metadata=_statistics_metadata)
def attention_statistics_kernel(
    o, do, lse, dlse, statistics, total_q, E: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr
):
    """What the backward needs of each query: statistics [2, N, T], from o, do [T, N*E] and lse, dlse [N, T].

    First lse in units of log 2, inf where a query sees nothing, so that its weights exp2(s - inf) are 0. Then
    sum(o * do) - dlse, what is to be taken from the gradient of each weight. dlse: None for zeros. Grid: tiles of
    ROWS, N.
    """
    start, head, heads = tl.program_id(0) * ROWS, tl.program_id(1), tl.num_programs(1)
    rows = start + tl.arange(0, ROWS)
    o_tile = load_tile(o, start, head * E, heads * E, total_q, ROWS, E, BLOCK_E)
    do_tile = load_tile(do, start, head * E, heads * E, total_q, ROWS, E, BLOCK_E)
    at = tl.cast(head, tl.int64) * total_q + rows
    delta = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
    if dlse is not None:
        delta -= tl.load(dlse + at, mask=rows < total_q, other=0.0)
    logarithm = tl.load(lse + at, mask=rows < total_q, other=0.0) * LOG2_E
    logarithm = tl.where(logarithm == float("-inf"), float("inf"), logarithm)
    tl.store(statistics + at, logarithm, mask=rows < total_q)
    tl.store(statistics + tl.cast(heads, tl.int64) * total_q + at, delta, mask=rows < total_q)


@device_function
def _weights(t, logarithm, scale):
    """Weights from scores as `cap` and `biased` return them; logarithm: inf where a query does not see a key."""
    return tl.exp2(t * scale - logarithm)


@device_function
def _scores_gradient(p, dp, delta, t, softcap):
    """Gradient of the scaled scores before the softcap, from the weights, dp = do v^T and the capped scores."""
    ds = p * (dp - delta)
    if softcap is not None:
        ds = ds * (1.0 - t * t)
    return ds


@triton.jit(launch_metadata=metadata(2, 2), do_not_specialize=VARYING)
def attention_dkdv_kernel(
    q, k, v, do, q_tiles, do_tiles, statistics, dk, dv,
    starts_q, starts_k, scale, softcap, q_stride, k_stride, v_stride, bias, bias_queries, bias_keys,
    total_q, len_q, len_k, left, right, num_sequences, group,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """ROWS keys of one kv head: dk [T', K*D], dv [T', K*E]. Grid: tiles, K, sequences (packed: 1).

    FUSED: both are columns of one contiguous gradient of q, k and v, of N + 2 K heads.
    It goes over the queries of every head that reads this one, in order: no atomics, and the same bits every time.
    Scores are kept transposed, [keys, queries], so that they are operands of both products from registers.
    """
    first_q, len_q, first_k, len_k, tile = place(starts_q, starts_k, len_q, len_k, num_sequences, starts_k, ROWS)
    start = tile * ROWS
    if start >= len_k:
        return
    kv_head = tl.program_id(1)
    end_q, end_k = first_q + len_q, first_k + len_k
    shift = len_k - len_q
    inner, scale_2 = factors(scale, softcap)
    do_stride = tl.num_programs(1) * group * E
    k_tile = load_tile(k, first_k + start, kv_head * D, k_stride, end_k, ROWS, D, BLOCK_D)
    v_tile = load_tile(v, first_k + start, kv_head * E, v_stride, end_k, ROWS, E, BLOCK_E)
    keys = start + tl.arange(0, ROWS)
    dk_acc = tl.full([ROWS, BLOCK_D], 0.0, tl.float32)
    dv_acc = tl.full([ROWS, BLOCK_E], 0.0, tl.float32)
    # Key j is seen by the queries from j - shift - right to j - shift + left.
    low, full_low, full_high, high = ranges(start, -shift, right, left, len_q, ROWS, STEP, EDGE)

    # One loop over the boundary tiles of all heads and one over the full ones: a loop in a loop would fill its pipeline
    # anew for every head, and keep the addresses of both alive.
    total = tl.cast(tl.num_programs(1) * group, tl.int64) * total_q
    edges = num_edges(low, full_low, full_high, high, EDGE)
    for index in tl.range(0, group * edges, num_stages=1):
        head = kv_head * group + index // edges
        m = edge(index % edges, low, full_low, full_high, EDGE)
        rows = m + tl.arange(0, EDGE)
        q_tile = load_tile(q, first_q + m, head * D, q_stride, end_q, EDGE, D, BLOCK_D)
        do_tile = load_tile(do, first_q + m, head * E, do_stride, end_q, EDGE, E, BLOCK_E)
        at = statistics + tl.cast(head, tl.int64) * total_q + first_q + rows
        logarithm = tl.load(at, mask=rows < len_q, other=float("inf"))
        delta = tl.load(at + total, mask=rows < len_q, other=0.0)
        seen = sees(rows[None, :], keys[:, None], shift, left, right, len_k)
        logarithm = tl.where(seen, logarithm[None, :], float("inf"))
        s = dot(k_tile, q_tile.T, None, PRECISION)
        dp = dot(v_tile, do_tile.T, None, PRECISION)
        t = cap(s, inner, softcap)
        t = biased(t, bias, head, m, start, scale, bias_queries, bias_keys, EDGE, ROWS, True)
        p = _weights(t, logarithm, scale_2)
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
        t = cap(s, inner, softcap)
        t = biased(t, bias, head, row - first_q, start, scale, bias_queries, bias_keys, STEP, ROWS, True)
        p = _weights(t, logarithm, scale_2)
        dv_acc = dot(cast(p, do_tile.dtype), do_tile, dv_acc, PRECISION)
        ds = _scores_gradient(p, dp, tl.load(at + total)[None, :], t, softcap)
        dk_acc = dot(cast(ds, q_tile.dtype), q_tile, dk_acc, PRECISION)
        row += STEP
        if row >= first_q + full_high:
            head += 1
            row = first_q + full_low

    # The stride of a fused gradient as an argument would be kept in a register through the loops, which spill then.
    dk_stride, dv_stride = tl.num_programs(1) * D, tl.num_programs(1) * E
    if FUSED:
        dk_stride = tl.num_programs(1) * (group + 2) * D
        dv_stride = dk_stride
    store_tile(dk, dk_acc * scale, first_k + start, kv_head * D, dk_stride, end_k, ROWS, D, BLOCK_D)
    store_tile(dv, dv_acc, first_k + start, kv_head * E, dv_stride, end_k, ROWS, E, BLOCK_E)


@device_function
def _of_keys(
    q_tile, do_tile, k_tile, v_tile, logarithm, delta, bias, head, row, key, scale, inner, scale_2, softcap,
    bias_queries, bias_keys, ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the scaled scores of ROWS queries and KEYS keys before the softcap, [ROWS, KEYS]."""
    s = dot(q_tile, k_tile.T, None, PRECISION)
    dp = dot(do_tile, v_tile.T, None, PRECISION)
    t = cap(s, inner, softcap)
    t = biased(t, bias, head, row, key, scale, bias_queries, bias_keys, ROWS, KEYS)
    return _scores_gradient(_weights(t, logarithm, scale_2), dp, delta[:, None], t, softcap)


@triton.jit(launch_metadata=metadata(2, 1), do_not_specialize=VARYING)
def attention_dq_kernel(
    q, k, v, do, k_tiles, v_tiles, statistics, dq,
    starts_q, starts_k, scale, softcap, q_stride, k_stride, v_stride, bias, bias_queries, bias_keys,
    total_q, len_q, len_k, left, right, num_sequences, group,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """ROWS queries of one head: dq [T, N*D]; FUSED: see dK/dV's. Grid: tiles, N, sequences (packed: 1)."""
    first_q, len_q, first_k, len_k, tile = place(starts_q, starts_k, len_q, len_k, num_sequences, starts_q, ROWS)
    if starts_q is None:
        tile = tl.num_programs(0) - 1 - tile  # the longest first, as in the forward
    start = tile * ROWS
    if start >= len_q:
        return
    head = tl.program_id(1)
    kv_head = head // group
    end_q, end_k = first_q + len_q, first_k + len_k
    shift = len_k - len_q
    inner, scale_2 = factors(scale, softcap)
    do_stride = tl.num_programs(1) * E
    q_tile = load_tile(q, first_q + start, head * D, q_stride, end_q, ROWS, D, BLOCK_D)
    do_tile = load_tile(do, first_q + start, head * E, do_stride, end_q, ROWS, E, BLOCK_E)
    rows = start + tl.arange(0, ROWS)
    statistics += tl.cast(head, tl.int64) * total_q + first_q + rows
    logarithm = tl.load(statistics, mask=rows < len_q, other=float("inf"))
    delta = tl.load(statistics + tl.cast(tl.num_programs(1), tl.int64) * total_q, mask=rows < len_q, other=0.0)
    acc = tl.full([ROWS, BLOCK_D], 0.0, tl.float32)
    low, full_low, full_high, high = ranges(start, shift, left, right, len_k, ROWS, STEP, EDGE)

    for index in tl.range(0, num_edges(low, full_low, full_high, high, EDGE), num_stages=1):
        n = edge(index, low, full_low, full_high, EDGE)
        keys = n + tl.arange(0, EDGE)
        k_tile = load_tile(k, first_k + n, kv_head * D, k_stride, end_k, EDGE, D, BLOCK_D)
        v_tile = load_tile(v, first_k + n, kv_head * E, v_stride, end_k, EDGE, E, BLOCK_E)
        seen = sees(rows[:, None], keys[None, :], shift, left, right, len_k)
        hiding = tl.where(seen, logarithm[:, None], float("inf"))
        ds = _of_keys(
            q_tile, do_tile, k_tile, v_tile, hiding, delta, bias, head, start, n, scale, inner, scale_2, softcap,
            bias_queries, bias_keys, ROWS, EDGE, PRECISION,
        )  # fmt: skip
        acc = dot(cast(ds, k_tile.dtype), k_tile, acc, PRECISION)

    for n in tl.range(full_low, full_high, STEP):
        k_tile = load_full_tile(k, k_tiles, first_k + n, kv_head * D, k_stride, STEP, D, BLOCK_D)
        v_tile = load_full_tile(v, v_tiles, first_k + n, kv_head * E, v_stride, STEP, E, BLOCK_E)
        ds = _of_keys(
            q_tile, do_tile, k_tile, v_tile, logarithm[:, None], delta, bias, head, start, n, scale, inner, scale_2,
            softcap, bias_queries, bias_keys, ROWS, STEP, PRECISION,
        )  # fmt: skip
        acc = dot(cast(ds, k_tile.dtype), k_tile, acc, PRECISION)

    dq_stride = tl.num_programs(1) * D
    if FUSED:
        dq_stride = (tl.num_programs(1) + tl.num_programs(1) // group * 2) * D
    store_tile(dq, acc * scale, first_q + start, head * D, dq_stride, end_q, ROWS, D, BLOCK_D)


@triton.jit(launch_metadata=metadata(1, 1), do_not_specialize=VARYING)
def attention_dbias_kernel(
    q, k, v, do, statistics, dbias,
    starts_q, starts_k, scale, softcap, q_stride, k_stride, v_stride, bias, bias_queries, bias_keys,
    total_q, len_q, len_k, left, right, num_sequences, group,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS queries and STEP keys of one head: dbias [N, bias_queries, bias_keys], a sum over the sequences in their
    order: no atomics, and the same bits every time. Grid: tiles of keys, tiles of queries, N."""
    key, row, head = tl.program_id(0) * STEP, tl.program_id(1) * ROWS, tl.program_id(2)
    kv_head = head // group
    inner, scale_2 = factors(scale, softcap)
    do_stride = tl.num_programs(2) * E
    total = tl.cast(tl.num_programs(2), tl.int64) * total_q
    rows, keys = row + tl.arange(0, ROWS), key + tl.arange(0, STEP)
    acc = tl.full([ROWS, STEP], 0.0, tl.float32)
    for sequence in tl.range(0, num_sequences):
        first_q, queries, first_k, there = sequence * len_q, len_q, sequence * len_k, len_k
        if starts_q is not None:
            first_q, queries = sequence_rows(starts_q, sequence, len_q)
            first_k, there = sequence_rows(starts_k, sequence, len_k)
        shift = there - queries
        # The farthest right that one of these queries sees, and the farthest left.
        high = tl.minimum(tl.minimum(row + ROWS, queries) + shift + right, there)
        low = tl.maximum(row + shift - left, 0)
        if (row < queries) & (key < high) & (key + STEP > low):
            q_tile = load_tile(q, first_q + row, head * D, q_stride, first_q + queries, ROWS, D, BLOCK_D)
            do_tile = load_tile(do, first_q + row, head * E, do_stride, first_q + queries, ROWS, E, BLOCK_E)
            k_tile = load_tile(k, first_k + key, kv_head * D, k_stride, first_k + there, STEP, D, BLOCK_D)
            v_tile = load_tile(v, first_k + key, kv_head * E, v_stride, first_k + there, STEP, E, BLOCK_E)
            at = statistics + tl.cast(head, tl.int64) * total_q + first_q + rows
            logarithm = tl.load(at, mask=rows < queries, other=float("inf"))
            delta = tl.load(at + total, mask=rows < queries, other=0.0)
            seen = sees(rows[:, None], keys[None, :], shift, left, right, there)
            hiding = tl.where(seen, logarithm[:, None], float("inf"))
            acc += _of_keys(
                q_tile, do_tile, k_tile, v_tile, hiding, delta, bias, head, row, key, scale, inner, scale_2, softcap,
                bias_queries, bias_keys, ROWS, STEP, PRECISION,
            )  # fmt: skip
    exists = (rows[:, None] < bias_queries) & (keys[None, :] < bias_keys)
    first = dbias + tl.cast(head, tl.int64) * bias_queries * bias_keys
    places = first + rows[:, None].to(tl.int64) * bias_keys + keys[None, :]
    tl.store(places, cast(acc, dbias.dtype.element_ty), mask=exists)
