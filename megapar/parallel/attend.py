"""Attention over the tokens of a micro-batch, wherever they are.

One contract, whatever ranks share the tokens: q, k and v are those of this rank's tokens, and so is the result. Today
every rank of a tensor-parallel region has all tokens of its heads, and attends alone.
"""

from torch import Tensor

from megapar.kernels.attention import attention


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, starts: Tensor | None = None) -> Tensor:
    """q [B, S, N, D], k and v [B, S, K, D] -> [B, S, N, D]; query head n reads key head n // (N / K).

    causal: a query sees no key behind it. starts: where packed sequences begin, see `kernels/attention`; no query sees
    a key of another one. None: every sample is a sequence.
    """
    if starts is None:
        return attention(q, k, v, causal=causal)
    packed = (part.flatten(0, 1) for part in (q, k, v))
    return attention(*packed, causal=causal, cu_seqlens_q=starts, cu_seqlens_k=starts).view(q.shape)
