"""Attention over the tokens of a micro-batch, wherever they are.

One contract, whatever ranks share the tokens: q, k and v are those of this rank's tokens, and so is the result. Today
every rank of a tensor-parallel region has all tokens of its heads, and attends alone. With a cache the tokens are those
that are new, and earlier ones are in it.
"""

from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megapar.kernels.attention import attention
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
    bias: Tensor | None = None,
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
    causal: a token sees none behind it; window: it sees so many up to itself; scale, softcap, bias: of the scores,
        see `kernels/attention`
    recompute: in backward again, with nothing kept of it
    new: of a text that is being written, what is new of it and where the rest is cached, under the number `layer`;
        `table` has a row for every token, [T, D], and `bias` is [N, capacity], by how far a key is back. Causal, and
        without gradients
    """
    if new is not None:
        assert causal, "a text is written from left to right"
        facts: Any = {"table": table, "window": window, "scale": scale, "softcap": softcap, "bias": bias}
        return attend_cached(qkv, heads, kv_heads, new, layer, **facts)
    sides = None if window is None else (window - 1, None)
    return fused_attention_(
        qkv, heads, kv_heads, length, table=table, starts=starts, causal=causal, window=sides, scale=scale,
        softcap=softcap, bias=bias, recompute=recompute,
    )  # fmt: skip


def attend_across(
    q: Tensor,
    kv: Tensor,
    heads: int,
    kv_heads: int,
    lengths: tuple[int, int],
    *,
    starts: tuple[Tensor | None, Tensor | None] = (None, None),
    scale: float | None = None,
    softcap: float | None = None,
    recompute: bool = False,
) -> Tensor:
    """q [T, N D] of one kind of tokens, kv [T', 2 K D] of another, k's heads before v's -> [T, N D]: every query sees
    every key of its sample, or of its sequence.

    lengths: positions of a sample, of either kind
    starts: where sequences of either begin; there are as many of the one as of the other
    scale, softcap, recompute: as of `attend_`
    """
    channels = q.shape[1] // heads
    q = q.view(-1, lengths[0], heads, channels)
    k, v = kv.view(-1, lengths[1], 2 * kv_heads, channels).split([kv_heads, kv_heads], 2)
    if starts[0] is not None:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    facts: Any = {"cu_seqlens_q": starts[0], "cu_seqlens_k": starts[1], "causal": False}
    attend: Any = partial(attention, **facts, scale=scale, softcap=softcap)
    if recompute:
        o: Tensor = checkpoint(attend, q, k, v, use_reentrant=False, preserve_rng_state=False)
    else:
        o = attend(q, k, v)
    return o.reshape(-1, heads * channels)
