"""Dropout refuses what it can't scale; its mask is compared across layouts in tests/parallel."""

import pytest
import torch

from megapar.kernels.dropout import dropout, token_keys


def test_integers_are_refused() -> None:
    keys = token_keys(torch.arange(2), torch.arange(2), 0)
    with pytest.raises(ValueError, match="need a floating dtype"):
        dropout(torch.ones(2, 3, dtype=torch.int32), 0.5, keys)
    for rate in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="rate"):
            dropout(torch.ones(2, 3), rate, keys)
