"""Lion: the sign of an interpolated momentum (Chen et al. 2023, arXiv 2302.06675, algorithm 2).

c <- beta1 * m + (1 - beta1) * g;  w <- w - lr * (sign(c) + weight_decay * w);  m <- beta2 * m + (1 - beta2) * g
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megapar.update_rules.kind import EachMatrix, Group, OptimizerKind, Settings, descend, keep_unless

if TYPE_CHECKING:
    from torch import Tensor


class Lion:
    def __init__(self, groups: Sequence[Group], settings: Settings, each_matrix: EachMatrix) -> None:
        self.groups, self.settings = groups, settings

    def update(self, lr: float, finite: Tensor) -> None:
        import torch

        for group in self.groups:
            keep_unless(finite, group.runs, "exp_avg")
            grads, moments = [run.grad for run in group.runs], [run.state["exp_avg"] for run in group.runs]
            # With d = g - m: the new m is m + (1 - beta2) * d, and c is that + (beta2 - beta1) * d. All in place.
            torch._foreach_sub_(grads, moments)
            torch._foreach_add_(moments, grads, alpha=1.0 - self.settings.beta2)
            torch._foreach_mul_(grads, self.settings.beta2 - self.settings.beta1)
            torch._foreach_add_(grads, moments)
            torch._foreach_sign_(grads)
            descend(group, grads, group.lr_scale * lr, finite)

    def resume(self, steps: int) -> None:
        """It doesn't depend on their number."""


OPTIMIZER = OptimizerKind(
    name="lion",
    about="the sign of an interpolated momentum: one moment",
    state=("exp_avg",),
    make=Lion,
    by_sign=True,
)
