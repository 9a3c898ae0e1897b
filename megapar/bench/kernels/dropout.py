"""Dropout of a layer's output, added to the residual stream. Both make the same mask; torch stores it."""

from collections.abc import Callable

import torch
from torch import Tensor

from megapar.bench.problem import Plan, Problem, Runner, differentiable, normal
from megapar.kernels import dropout as kernel
from megapar.kernels.shapes import DTYPES, Sizes

RATE, SITE = 0.1, (1234, 1, 0, 1)


def dropout(sizes: Sizes, tokens: int, dtype: str, device: str) -> Problem:
    x, residual, dout = (normal(tokens, sizes.hidden, dtype=DTYPES[dtype], device=device) for _ in range(3))
    samples, positions = torch.zeros(tokens, dtype=torch.int64, device=device), torch.arange(tokens, device=device)

    def plain(x: Tensor, residual: Tensor) -> Tensor:
        keys = kernel.token_keys(samples, positions, *SITE)
        return residual + x * kernel.keep_mask(1.0 - RATE, keys, sizes.hidden) * (1.0 / (1.0 - RATE))

    def plans(arch: str) -> dict[str, Plan]:
        places, key = (samples, positions), kernel.site_key(SITE)
        out = torch.empty_like(x)
        return {
            "forward": Plan([kernel.launch(x, residual, out, *places, key, RATE)]),
            "backward": Plan([kernel.launch(dout, None, out, *places, key, RATE)]),
        }

    providers: dict[str, Callable[[], Runner]] = {
        "megapar": lambda: differentiable(
            lambda x, residual: kernel.dropout(x, RATE, samples, positions, SITE, residual), (x, residual), [dout]
        ),
        "torch": lambda: differentiable(plain, (x, residual), [dout]),
    }
    return Problem(providers, plans)


BENCH = {"dropout": dropout}
