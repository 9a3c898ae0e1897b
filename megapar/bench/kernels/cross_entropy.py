"""Cross entropy over a model's vocabulary, on one rank: the mean over tokens.

Our backward, and Liger's forward, put the gradient in the logits' place. So when they are timed again and again they
meet other numbers; that changes no time.
"""

from typing import Any

import torch
import torch.nn.functional as F

from megapar.bench.problem import Plan, Problem, Runner, differentiable, normal
from megapar.kernels import cross_entropy as kernel
from megapar.kernels.shapes import DTYPES, Sizes


def cross_entropy(sizes: Sizes, tokens: int, dtype: str, device: str) -> Problem:
    logits = normal(tokens, sizes.vocab, dtype=DTYPES[dtype], device=device)
    targets = torch.randint(sizes.vocab, (tokens,), device=device)
    one = torch.ones((), dtype=logits.dtype, device=device)
    share = torch.full((tokens,), 1.0 / tokens, device=device)

    def ours() -> Runner:
        def forward() -> Any:
            merged = kernel.merge_statistics(kernel.cross_entropy_statistics(logits, targets, 0).unsqueeze(0))
            return merged.losses(kernel.PLAIN).mean(), merged.log_sum

        def backward(kept: Any) -> Any:
            return kernel.cross_entropy_gradient_(logits, targets, 0, kept[1], share, kernel.PLAIN)

        return Runner(forward, backward)

    def liger() -> Runner:
        from liger_kernel.transformers.functional import liger_cross_entropy

        return differentiable(lambda x: liger_cross_entropy(x, targets), (logits,), [one])

    def plans(arch: str) -> dict[str, Plan]:
        statistics, log_sum = torch.empty(tokens, 3, device=device), torch.empty(tokens, device=device)
        forward = kernel.launch_statistics(logits, targets, statistics, 0)
        backward = kernel.launch_gradient(logits, targets, log_sum, share, 0, kernel.PLAIN)
        return {"forward": Plan([forward]), "backward": Plan([backward])}

    providers = {
        "megapar": ours,
        "torch": lambda: differentiable(lambda x: F.cross_entropy(x, targets), (logits,), [one]),
        "liger_kernel": liger,
    }
    return Problem(providers, plans)


BENCH = {"cross_entropy": cross_entropy}
