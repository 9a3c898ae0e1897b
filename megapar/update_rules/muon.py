"""Muon: momentum of every matrix of a layer, made orthogonal (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

As it is in Liu et al. 2025 (Moonlight, arXiv 2502.16982, section 2): the update has the root mean square of AdamW's, so
that its learning rate and weight decay carry over, and embedding, head, norms and biases go by AdamW.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megapar.update_rules.kind import EachMatrix, Group, OptimizerKind, Settings, descend, keep_unless

if TYPE_CHECKING:
    from torch import Tensor

STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
RMS = 0.2  # of AdamW's updates, about
TINY = 1e-7  # least norm that is divided by: a matrix of zeros stays one


def orthogonal(matrix: Tensor) -> Tensor:
    """[m, n], about U V^T of its singular value decomposition U S V^T: singular values of 0.7 to 1.2, by Newton-Schulz
    in the matrix's own dtype, which makes layouts agree. Whatever its scale."""
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = wide / wide.norm().clamp(min=TINY)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.T
        x = x.addmm(gram.addmm(gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if wide is not matrix else x


def scaled(matrix: Tensor) -> Tensor:
    """`orthogonal` with the root mean square of an update of AdamW: 0.2 * sqrt(max(m, n)) times it."""
    return orthogonal(matrix).mul_(RMS * max(matrix.shape) ** 0.5)


class Muon:
    """m <- momentum * m + (1 - momentum) * g; w <- w - lr * (scaled(momentum * m + (1 - momentum) * g) + decay * w).

    The second sum is Nesterov's. The factor 1 - momentum, as torch.optim.Muon has it, changes nothing but the scale.
    """

    def __init__(self, groups: Sequence[Group], settings: Settings, each_matrix: EachMatrix) -> None:
        self.groups, self.settings, self.each_matrix = groups, settings, each_matrix

    def update(self, lr: float, finite: Tensor) -> None:
        import torch

        decay = self.settings.momentum
        for group in self.groups:
            keep_unless(finite, group.runs, "momentum")
            grads, moments = [run.grad for run in group.runs], [run.state["momentum"] for run in group.runs]
            torch._foreach_lerp_(moments, grads, 1.0 - decay)
            torch._foreach_lerp_(grads, moments, decay)
        self.each_matrix(scaled)
        for group in self.groups:
            descend(group, [run.grad for run in group.runs], group.lr_scale * lr, finite)

    def resume(self, steps: int) -> None:
        """It doesn't depend on their number."""


OPTIMIZER = OptimizerKind(
    name="muon",
    about="orthogonal momentum for the matrices of layers, AdamW for all else",
    state=("momentum",),
    make=Muon,
    others="adamw",
)
