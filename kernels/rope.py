"""Rotary position embedding (Su et al. 2021), pairs (i, i + D/2) as in Llama."""

import torch
from torch import Tensor


def rope_table(length: int, channels: int, theta: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[length, channels]: cosines in the first half of the channels, sines in the second. Computed in fp64."""
    frequency = theta ** (-torch.arange(0, channels, 2, dtype=torch.float64, device=device) / channels)
    angle = torch.arange(length, dtype=torch.float64, device=device).unsqueeze(1) * frequency
    return torch.cat([angle.cos(), angle.sin()], 1).to(dtype)


def rope(x: Tensor, table: Tensor) -> Tensor:
    """Rotate x [B, S, N, D] by position with table [S, D], in the table's dtype; returns x's dtype."""
    cosine, sine = table.unsqueeze(1).chunk(2, -1)
    first, second = x.to(table.dtype).chunk(2, -1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1).to(x.dtype)
