"""SwiGLU (Shazeer 2020): the gated activation of Llama's MLP."""

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise: [T, F], [T, F] -> [T, F]."""
    return F.silu(gate) * up
