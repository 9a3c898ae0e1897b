"""Attention over the tokens of a micro-batch, wherever they are.

One contract, whatever ranks share the tokens: q, k and v are those of this rank's tokens, and so is the result. Today
every rank of a tensor-parallel region has all tokens of its heads, and attends alone. With a cache the tokens are those
that are new, and earlier ones are in it.
"""

from typing import Any

from torch import Tensor

from megapar.kernels.attention.fused import fused_attention_
from megapar.parallel.cache import NewTokens, attend_cached


def attend_(
    qkv: Tensor,
    heads: int,
    kv_heads: int,
    length: int,
    *,
    table: Tensor | None = None,
    starts: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    recompute: bool = False,
    new: NewTokens | None = None,
    layer: int = 0,
) -> Tensor:
    """qkv [T, (N + 2 K) D], the heads of q, then of k, then of v -> [T, N D]; query head n reads key head n // (N / K).
    qkv is given up.

    length: positions of a sample
    table: of rotary positions, [length, D], by which q and k are turned first; None: they are not
    starts: where packed sequences begin, see `kernels/attention`; no query sees a key of another one. None: every
        sample is a sequence
    causal: a token sees none behind it; window: it sees so many up to itself; scale, softcap: of the scores, see
        `kernels/attention`
    recompute: in backward again, with nothing kept of it
    new: of a text that is being written, what is new of it and where the rest is cached, under the number `layer`;
        `table` has a row for every token, [T, D]. Causal, and without gradients
    """
    if new is not None:
        assert causal, "a text is written from left to right"
        facts: Any = {"table": table, "window": window, "scale": scale, "softcap": softcap}
        return attend_cached(qkv, heads, kv_heads, new, layer, **facts)
    sides = None if window is None else (window - 1, None)
    return fused_attention_(
        qkv, heads, kv_heads, length, table=table, starts=starts, causal=causal, window=sides, scale=scale,
        softcap=softcap, recompute=recompute,
    )  # fmt: skip
