"""Scaled dot-product attention with grouped query heads."""

import math

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, scale: float | None = None) -> Tensor:
    """softmax(scale * q k^T) v per head.

    q [B, S, N, D], k and v [B, S, K, D] with N a multiple of K: query head n reads kv head n // (N / K), without
    repeating k or v. scale: 1/sqrt(D) by default. Softmax in at least fp32. Returns [B, S, N, D] in q's dtype.
    """
    batch, length, heads, channels = q.shape
    groups = k.shape[2]
    scale = 1.0 / math.sqrt(channels) if scale is None else scale
    # One batched matmul per kv head: the query heads that share it are stacked along the rows.
    q = q.view(batch, length, groups, heads // groups, channels).permute(0, 2, 3, 1, 4)
    q = q.reshape(batch * groups, heads // groups * length, channels)
    k = k.transpose(1, 2).reshape(batch * groups, length, channels)
    v = v.transpose(1, 2).reshape(batch * groups, length, channels)
    scores = torch.bmm(q * scale, k.transpose(1, 2)).view(batch * groups, heads // groups, length, length)
    if causal:
        future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    weights = torch.softmax(scores, -1, dtype=wide).to(q.dtype)
    out = torch.bmm(weights.view(batch * groups, -1, length), v)
    out = out.view(batch, groups, heads // groups, length, channels)
    return out.permute(0, 3, 1, 2, 4).reshape(batch, length, heads, channels)
