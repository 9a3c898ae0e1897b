"""Attention as its definition reads, one query at a time; shares no code with the library."""

import math

import torch
from torch import Tensor


def naive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window: tuple,
    scale: float,
    softcap: float | None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One sequence: q [S, N, D], k [L, K, D], v [L, K, E], bias [N, S, L] -> o [S, N, E], lse [S, N]."""
    (length, heads, _), (keys, groups, width) = q.shape, v.shape
    left, right = window
    o, lse = torch.zeros(length, heads, width, dtype=q.dtype), torch.full((length, heads), -math.inf, dtype=q.dtype)
    for i in range(length):
        for n in range(heads):
            place = i + keys - length
            seen = [
                j
                for j in range(keys)
                if not (causal and j > place)
                and (left is None or j >= place - left)
                and (right is None or j <= place + right)
            ]
            if not seen:
                continue
            group = n // (heads // groups)
            scores = torch.stack([q[i, n] @ k[j, group] * scale for j in seen])
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if bias is not None:
                scores = scores + bias[n, i, seen]
            total = scores.exp().sum()
            o[i, n] = sum((scores[a].exp() / total) * v[j, group] for a, j in enumerate(seen))
            lse[i, n] = total.log()
    return o, lse
