"""RMSNorm over rows of a model's hidden width. The backward has the weight's gradient, too."""

from typing import Any

import torch
import torch.nn.functional as F

from megapar.bench.problem import Plan, Problem, Runner, differentiable, normal
from megapar.kernels import rmsnorm as rms
from megapar.kernels._common import num_tiles
from megapar.kernels.shapes import DTYPES, Sizes

EPS = 1e-5


def rmsnorm(sizes: Sizes, tokens: int, dtype: str, device: str) -> Problem:
    kind, width = DTYPES[dtype], sizes.hidden
    x, dy = (normal(tokens, width, dtype=kind, device=device) for _ in range(2))
    weight = torch.ones(width, dtype=kind, device=device)

    def ours() -> Runner:
        def backward(kept: Any) -> Any:
            _, h, rstd = kept
            return rms.rmsnorm_input_grad(dy, h, weight, rstd), rms.rmsnorm_weight_grad(dy, h, rstd)

        return Runner(lambda: rms.rmsnorm(x, weight, EPS), backward)

    def liger() -> Runner:
        from liger_kernel.transformers.functional import liger_rms_norm

        return differentiable(lambda x, w: liger_rms_norm(x, w, EPS, in_place=False), (x, weight), [dy])

    def plans(arch: str) -> dict[str, Plan]:
        y, dx, rstd = torch.empty_like(x), torch.empty_like(x), torch.empty(tokens, device=device)
        partial = torch.empty(num_tiles(tokens, rms.BLOCK_ROWS), width, device=device)
        backward = [
            rms.launch_input_grad(dy, x, weight, rstd, None, dx),
            rms.launch_weight_grad(dy, x, rstd, partial),
        ]
        return {
            "forward": Plan([rms.launch_forward(x, None, weight, y, None, rstd, EPS)]),
            "backward": Plan(backward, scratch=[partial], beside=[partial[0]]),
        }

    torch_norm = lambda x, w: F.rms_norm(x, (width,), w, EPS)  # noqa: E731
    providers = {
        "megapar": ours,
        "torch": lambda: differentiable(torch_norm, (x, weight), [dy]),
        "liger_kernel": liger,
    }
    return Problem(providers, plans)


BENCH = {"rmsnorm": rmsnorm}
