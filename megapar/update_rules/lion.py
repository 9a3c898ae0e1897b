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
            directions = list(torch._foreach_lerp(moments, grads, 1.0 - self.settings.beta1))
            torch._foreach_sign_(directions)
            torch._foreach_lerp_(moments, grads, 1.0 - self.settings.beta2)
            descend(group, directions, group.lr_scale * lr, finite)

    def resume(self, steps: int) -> None:
        """It doesn't depend on their number."""


OPTIMIZER = OptimizerKind(
    name="lion",
    about="the sign of an interpolated momentum: one moment",
    state=("exp_avg",),
    make=Lion,
)
