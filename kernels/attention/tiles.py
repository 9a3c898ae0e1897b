"""What attention's kernels share: which tiles a program visits, masks, the softcap; and what a profiler is told."""

from itertools import pairwise
from typing import Any

from torch import Tensor

from megapar.kernels._common import LOG2_E, device_function, find_sequence, sequence_rows, tl

# Arguments whose values must not become part of a compilation: they change from batch to batch.
VARYING = ["total_q", "len_q", "len_k", "left", "right", "num_sequences", "group", "bias_queries", "bias_keys"]


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


def metadata(matmuls_d: int, matmuls_e: int) -> Any:
    """Triton's launch_metadata: useful FLOPs and least bytes of a launch, from matmuls over D and over E channels."""

    def describe(grid: Any, kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
        heads = args["q"].shape[1] // args["D"]
        flops = 2.0 * (matmuls_d * args["D"] + matmuls_e * args["E"]) * heads * _visible_pairs(args)
        return {"name": kernel.name, f"flops{8 * args['q'].element_size()}": flops, "bytes": bytes_of(args)}

    return describe


def bytes_of(args: dict[str, Any]) -> int:
    """Every tensor once."""
    return sum(x.numel() * x.element_size() for x in args.values() if isinstance(x, Tensor))


@device_function
def place(starts_q, starts_k, len_q, len_k, num_sequences, starts, ROWS: tl.constexpr):
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
def ranges(start, shift, before, after, length, ROWS: tl.constexpr, STEP: tl.constexpr, EDGE: tl.constexpr):
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
def num_edges(low, full_low, full_high, high, EDGE: tl.constexpr):
    """How many boundary tiles lie in [low, full_low) and [full_high, high)."""
    return (full_low - low) // EDGE + (tl.maximum(high - full_high, 0) + EDGE - 1) // EDGE


@device_function
def edge(index, low, full_low, full_high, EDGE: tl.constexpr):
    """Where boundary tile `index` begins: first those before the full tiles, then those behind."""
    before = (full_low - low) // EDGE
    return tl.where(index < before, low + index * EDGE, full_high + (index - before) * EDGE)


@device_function
def sees(query, key, shift, left, right, len_k):
    """Whether a query sees a key, elementwise, broadcast."""
    distance = key - query - shift
    return (key < len_k) & (distance <= right) & (distance >= -left)


@device_function
def factors(scale, softcap):
    """(factor inside the tanh, factor to scores in units of log 2)."""
    if softcap is None:
        return 1.0, scale * LOG2_E
    else:
        return 2.0 * LOG2_E * scale / softcap, softcap * LOG2_E


@device_function
def cap(s, inner, softcap):
    """tanh, the score in units of softcap; without a softcap s as it is."""
    if softcap is not None:
        s = 1.0 - 2.0 / (1.0 + tl.exp2(s * inner))
    return s


@device_function
def biased(
    s, bias, head, row, key, scale, bias_queries, bias_keys, ROWS: tl.constexpr, KEYS: tl.constexpr,
    TRANSPOSED: tl.constexpr = False,
):  # fmt: skip
    """Scores s, before they are scaled, of ROWS queries from `row` and KEYS keys from `key` on, and their bias
    [N, bias_queries, bias_keys]; None: s as it is. TRANSPOSED: s is [KEYS, ROWS].

    Where the bias has no element it is 0, and nothing is read.
    """
    if bias is not None:
        rows, keys = tl.arange(0, ROWS), tl.arange(0, KEYS)
        if TRANSPOSED:
            rows, keys = rows[None, :], keys[:, None]
        else:
            rows, keys = rows[:, None], keys[None, :]
        first = bias + (tl.cast(head, tl.int64) * bias_queries + row) * bias_keys + key
        exists = (rows < bias_queries - row) & (keys < bias_keys - key)
        tile = tl.load(first + rows * bias_keys + keys, mask=exists, other=0.0)
        s += tile.to(tl.float32) * (1.0 / scale)
    return s
