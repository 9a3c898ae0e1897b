"""Digests of tensors' bits: two that differ in one word never have the same, others almost never."""

from functools import lru_cache

import torch
from torch import Tensor

_PIECE = 1 << 16  # words at a time: half a MB


def digest(x: Tensor) -> Tensor:
    """int64 0-dim on the device of x: of its bits in their order, whatever its dtype; nothing waits for its value.

    The sum over 64-bit words x[i] of mix(x[i] + key[i]), modulo 2^64, in pieces whose sums are words in turn. mix is
    one to one (a round of SplitMix64's finaliser), so one changed word always changes the sum; integer sums have the
    same bits in any order of addition.
    """
    flat = x.detach().contiguous().reshape(-1).view(torch.uint8)
    if len(flat) % 8 or (flat.storage_offset() + flat.untyped_storage().data_ptr()) % 8:
        flat = torch.cat([flat, flat.new_zeros(-len(flat) % 8)])
    return _fold(flat.view(torch.int64)) + x.numel()


def _fold(words: Tensor) -> Tensor:
    keys = _keys(words.device)
    if len(words) <= _PIECE:
        return _mixed(words + keys[: len(words)]).sum()
    return _fold(torch.stack([_fold(piece) for piece in words.split(_PIECE)]))


def _mixed(words: Tensor) -> Tensor:
    """In place."""
    words ^= (words >> 32) & 0xFFFFFFFF
    words *= -0x61C8864680B583EB
    words ^= (words >> 29) & 0x7FFFFFFFF
    return words


@lru_cache(maxsize=2)
def _keys(device: torch.device) -> Tensor:
    """int64 [_PIECE]: one for every place."""
    return _mixed(_mixed(torch.arange(1, _PIECE + 1, dtype=torch.int64, device=device) * -0x40A7B892E31B1A47))
