"""Attention in plain differentiable torch, in any floating dtype: what the kernels are measured with."""

import math
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
    """Packed sequences in plain torch, those of equal lengths at once: q [T, N, D], k [T', K, D], v [T', K, E].

    Each has the first rows and columns of bias."""
    lengths = list(zip(*(cu.diff().tolist() for cu in (cu_q, cu_k)), strict=True))
    alike: dict[tuple[int, int], list[int]] = {}
    for number, pair in enumerate(lengths):
        alike.setdefault(pair, []).append(number)
    rows, columns = _order(cu_q, alike), _order(cu_k, alike)
    parts = zip(_parts(q, rows, alike, 0), _parts(k, columns, alike, 1), _parts(v, columns, alike, 1), strict=True)
    outs, lses = [], []
    for part, (length, keys) in zip(parts, alike, strict=True):
        own = None if bias is None else bias[:, :length, :keys]
        found = dense(*part, scale, left, right, softcap, own, return_lse)
        outs.append((found[0] if return_lse else found).flatten(0, 1))
        lses += [found[1].flatten(0, 1)] if return_lse else []
    rest, back = len(q) - len(rows), rows.argsort()  # rest: rows behind the last sequence
    out = torch.cat([torch.cat(outs).index_select(0, back), q.new_zeros(rest, q.shape[1], v.shape[2])])
    if not return_lse:
        return out
    none = torch.full((rest, q.shape[1]), -math.inf, dtype=lses[0].dtype, device=q.device)
    return out, torch.cat([torch.cat(lses).index_select(0, back), none])


def _order(cu: Tensor, alike: dict[tuple[int, int], list[int]]) -> Tensor:
    """Rows of packed sequences, those of equal lengths together: int64 [T]."""
    starts = cu.tolist()
    rows = [torch.arange(starts[number], starts[number + 1]) for numbers in alike.values() for number in numbers]
    return torch.cat(rows).to(cu.device)


def _parts(x: Tensor, order: Tensor, alike: dict[tuple[int, int], list[int]], side: int) -> list[Tensor]:
    """x [T, ...] as [B, S, ...] for each pair of lengths."""
    sizes = [len(numbers) * pair[side] for pair, numbers in alike.items()]
    parts = x.index_select(0, order).split(sizes)
    return [
        part.view(len(numbers), pair[side], *x.shape[1:])
        for part, (pair, numbers) in zip(parts, alike.items(), strict=True)
    ]
