"""LayerNorm over rows of a model's hidden width. The backward has the gradients of both weights, too."""

from typing import Any

import torch
import torch.nn.functional as F

from megapar.bench.problem import Plan, Problem, Runner, differentiable, normal
from megapar.kernels import layernorm as layer
from megapar.kernels._common import num_tiles
from megapar.kernels.shapes import DTYPES, Sizes

EPS = 1e-5


def layernorm(sizes: Sizes, tokens: int, dtype: str, device: str) -> Problem:
    kind, width = DTYPES[dtype], sizes.hidden
    x, dy = (normal(tokens, width, dtype=kind, device=device) for _ in range(2))
    weight, bias = torch.ones(width, dtype=kind, device=device), torch.zeros(width, dtype=kind, device=device)

    def ours() -> Runner:
        def backward(kept: Any) -> Any:
            _, h, mean, rstd = kept
            of_weights = layer.layernorm_weight_grad(dy, h, mean, rstd)
            return layer.layernorm_input_grad(dy, h, weight, mean, rstd), *of_weights

        return Runner(lambda: layer.layernorm(x, weight, bias, EPS), backward)

    def liger() -> Runner:
        from liger_kernel.transformers.functional import liger_layer_norm

        return differentiable(lambda x, w, b: liger_layer_norm(x, w, b, EPS), (x, weight, bias), [dy])

    def plans(arch: str) -> dict[str, Plan]:
        y, dx = torch.empty_like(x), torch.empty_like(x)
        mean, rstd = torch.empty(2, tokens, device=device)
        partial = torch.empty(2, num_tiles(tokens, layer.BLOCK_ROWS), width, device=device)
        forward = layer.launch_forward(x, None, weight, bias, y, None, mean, rstd, EPS)
        backward = [
            layer.launch_input_grad(dy, x, weight, mean, rstd, None, dx),
            layer.launch_weight_grad(dy, x, mean, rstd, partial),
        ]
        return {
            "forward": Plan([forward]),
            "backward": Plan(backward, scratch=[partial], beside=[partial[:, 0]]),
        }

    torch_norm = lambda x, w, b: F.layer_norm(x, (width,), w, b, EPS)  # noqa: E731
    providers = {
        "megapar": ours,
        "torch": lambda: differentiable(torch_norm, (x, weight, bias), [dy]),
        "liger_kernel": liger,
    }
    return Problem(providers, plans)


BENCH = {"layernorm": layernorm}
