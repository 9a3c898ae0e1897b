"""Dropout whose keep-mask is a function of coordinates, equal in every layout and in recomputation."""

import torch
from torch import Tensor

from megapar.kernels.registry import Kernel

_A, _B = -49064778989728563, -4265267296055464877  # the multipliers of MurmurHash3's 64-bit finaliser, as int64


def _shift(x: Tensor) -> Tensor:
    """x ^ (x >>> 33) on int64, whose own >> keeps the sign."""
    return x ^ ((x >> 33) & 0x7FFFFFFF)


def _mix(x: Tensor) -> Tensor:
    """MurmurHash3's 64-bit finaliser: a bijection that lets every input bit reach every output bit."""
    return _shift(_shift(_shift(x) * _A) * _B)


def keep_mask(probability: float, token_keys: Tensor, channels: int) -> Tensor:
    """[t, channels] bool, True with the given probability.

    token_keys [t] int64: one well-mixed key per token (see `token_keys`). Channel c of a token is a function of the
    token's key and c alone.
    """
    channel = torch.arange(channels, device=token_keys.device)
    draws = _mix(token_keys.unsqueeze(1) + channel * 0x2545F4914F6CDD1D)
    return ((draws >> 11) & ((1 << 53) - 1)) < int(probability * (1 << 53))


def token_keys(samples: Tensor, positions: Tensor, *site: int) -> Tensor:
    """[t] int64 keys from global sample numbers [t], positions [t] and the site (seed, step, layer, place)."""
    key = torch.zeros_like(samples)
    for number in site:
        key = _mix(key + number + 1)
    return _mix(_mix(key + samples + 1) + positions + 1)


def dropout(x: Tensor, rate: float, keys: Tensor) -> Tensor:
    """x [t, H] with elements zeroed at the given rate and the rest scaled by 1 / (1 - rate).

    Raises ValueError for integers and for a rate outside [0, 1).
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate {rate}: need at least 0 and less than 1")
    if not x.is_floating_point():
        raise ValueError(f"x {list(x.shape)} {x.dtype}: need a floating dtype")
    return x * keep_mask(1.0 - rate, keys, x.shape[1]) * (1.0 / (1.0 - rate))


KERNEL = Kernel("dropout", triton=False, place=8)
