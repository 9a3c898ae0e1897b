"""Attention in plain differentiable torch, in any floating dtype: what the kernels are measured with."""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    left: int,
    right: int,
    softcap: float | None,
    bias: Tensor | None,
    return_lse: bool,
) -> Any:
    """Attention in plain differentiable torch: q [B, S, N, D], k [B, L, K, D], v [B, L, K, E], bias [N, S, L]."""
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
    if bias is not None:
        by_sample = scores.to(wide).view(batch, heads, length, keys) + bias.to(wide)
        scores = by_sample.view(scores.shape)
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


def packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    left: int,
    right: int,
    softcap: float | None,
    bias: Tensor | None,
    return_lse: bool,
) -> Any:
    """Packed sequences in plain torch, those of equal lengths at once: q [T, N, D], k [T', K, D], v [T', K, E]; each has
    the first rows and columns of bias."""
    starts_q, starts_k = cu_q.tolist(), cu_k.tolist()
    alike: dict[tuple[int, int], list[int]] = {}
    for number, ((a, b), (c, d)) in enumerate(zip(pairwise(starts_q), pairwise(starts_k), strict=True)):
        alike.setdefault((b - a, d - c), []).append(number)
    outs, lses, places = [], [], []
    for (length, keys), numbers in alike.items():
        rows, columns = (
            torch.tensor([starts[number] for number in numbers], device=q.device).unsqueeze(1)
            + torch.arange(size, device=q.device)
            for starts, size in ((starts_q, length), (starts_k, keys))
        )
        own = None if bias is None else bias[:, :length, :keys]
        found = dense(
            _taken(q, rows), _taken(k, columns), _taken(v, columns), scale, left, right, softcap, own, return_lse
        )
        out, lse = found if return_lse else (found, None)
        outs.append(out.flatten(0, 1))
        lses += [lse.flatten(0, 1)] if lse is not None else []
        places.append(rows.flatten())
    first, count = starts_q[-1], len(q)  # behind the last sequence there may be rows of none
    outs.append(q.new_zeros(count - first, q.shape[1], v.shape[2]))
    places.append(torch.arange(first, count, device=q.device))
    order = torch.cat(places).argsort()
    out = torch.cat(outs).index_select(0, order)
    if not return_lse:
        return out
    lses.append(torch.full((count - first, q.shape[1]), -math.inf, dtype=lses[0].dtype, device=q.device))
    return out, torch.cat(lses).index_select(0, order)


def _taken(x: Tensor, rows: Tensor) -> Tensor:
    """x [T, ...] at rows [B, S]: [B, S, ...]."""
    return x.index_select(0, rows.flatten()).view(*rows.shape, *x.shape[1:])
