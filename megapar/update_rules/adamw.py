"""AdamW: Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101). torch's fused kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megapar.update_rules.kind import EachMatrix, Group, OptimizerKind, Settings

if TYPE_CHECKING:
    from torch import Tensor


class AdamW:
    """The kernel leaves everything as it is where it is told that a gradient isn't finite."""

    def __init__(self, groups: Sequence[Group], settings: Settings, each_matrix: EachMatrix) -> None:
        import torch

        self.scales = [group.lr_scale for group in groups]
        options: list[dict[str, Any]] = []
        states: dict[Tensor, dict[str, Tensor]] = {}
        for group in groups:
            for run in group.runs:
                run.weight.grad = run.grad
                states[run.weight] = {"step": torch.zeros((), device=run.weight.device), **run.state}
            options.append({"params": [run.weight for run in group.runs], "weight_decay": group.weight_decay})
        betas = (settings.beta1, settings.beta2)
        self.adamw = torch.optim.AdamW(options, betas=betas, eps=settings.eps, fused=True)
        self.adamw.state.update(states)  # its moments are kept by whoever owns the runs

    def update(self, lr: float, finite: Tensor) -> None:
        for group, scale in zip(self.adamw.param_groups, self.scales, strict=True):
            group["lr"] = scale * lr
        self.adamw.found_inf = finite.logical_not().float().squeeze(0)  # type: ignore[attr-defined]
        self.adamw.step()

    def resume(self, steps: int) -> None:
        for state in self.adamw.state.values():
            state["step"].fill_(steps)


OPTIMIZER = OptimizerKind(
    name="adamw",
    about="Adam with decoupled weight decay",
    state=("exp_avg", "exp_avg_sq"),
    make=AdamW,
)
