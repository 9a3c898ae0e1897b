"""Our optimizers around a model of the library."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from megapar.config.check import check_optimizer
from megapar.config.errors import UserError
from megapar.config.keys import check_values
from megapar.config.parse import parse
from megapar.config.schema import OptimConfig, TrainConfig
from megapar.library.model import Model
from megapar.optim.optimizer import Optimizer, StepResult

_DEFAULT = OptimConfig()
Groups = Mapping[str, Mapping[str, float]] | None


class OnModel:
    """An optimizer of `megapar train` around a model, for every dtype and layout. `lr` may be set between steps.

    Other than torch's they clip by the global gradient norm (clip_grad; 0: not), weight decay leaves norms and biases
    alone, bf16 parameters have fp32 weights beside them, and a step whose gradients are not finite changes nothing.
    A parameter without a gradient counts as one whose gradient is zero. After a step gradients hold nothing of use.
    groups: options by part of the model, as `optim.groups` has them: {"embedding": {"lr_scale": 0.1}}
    """

    name = ""  # of the class, as a refusal gives it; in lower case that of the update rule
    torchs = "AdamW"  # the nearest of torch's own

    def __init__(self, model: Model, **values: Any) -> None:
        if not isinstance(model, Model):
            problem = f"expects the model that megapar.build made, not {type(model).__name__}"
            raise UserError(f"{self.name}: {problem}; for other parameters use torch.optim.{self.torchs}")
        parsed: Any = parse(TrainConfig, {"optim": {"name": self.name.lower(), **values}})
        config = replace(model.config, optim=parsed.optim)
        check_values(config.optim, "optim.")
        check_optimizer(config)
        self.model, self.lr = model, config.optim.lr
        self._optimizer = Optimizer(model.part.buffers, model.sync.owned, config.optim)
        model.gradients.owned = True
        model.register_load_state_dict_post_hook(lambda *unused: self.refresh())

    def step(self) -> StepResult:
        """Clip and update. Collective. Returns the gradient norm before clipping, and whether the step was skipped.

        Raises UserError where there are no gradients, and for a frozen parameter, which weight decay would change.
        """
        gradients, parameters = self.model.gradients, self.model.part.context.parameters
        if frozen := [local.name for local in parameters if not local.tensor.requires_grad]:
            problem = f"{frozen[0]} is frozen, and its buffer is updated as a whole"
            raise UserError(f"{self.name}: {problem}; use torch.optim.{self.torchs}")
        if not any(gradients.has(local) for local in parameters):
            raise UserError(
                f"{self.name}: there are no gradients; call loss.backward() or model.forward_backward first"
            )
        for local in parameters:
            gradients.settle(local)
        with torch.no_grad():
            return self._optimizer.step(self.lr)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As `model.zero_grad`."""
        self.model.zero_grad(set_to_none)

    def refresh(self) -> None:
        """Take over parameters that something else has written. `load_state_dict` does it by itself."""
        owned = self.model.part.buffers.take_owned(self.model.part.buffers.params)
        for masters, values in zip(self._optimizer.masters, owned, strict=True):
            masters.copy_(values)


class AdamW(OnModel):
    """AdamW: `AdamW(model, lr=1e-3)`. `OnModel` says what all optimizers have in common."""

    name = "AdamW"

    def __init__(
        self,
        model: Model,
        lr: float = _DEFAULT.lr,
        betas: tuple[float, float] = (_DEFAULT.beta1, _DEFAULT.beta2),
        eps: float = _DEFAULT.eps,
        weight_decay: float = _DEFAULT.weight_decay,
        *,
        clip_grad: float = _DEFAULT.clip_grad,
        groups: Groups = None,
    ) -> None:
        own = {"beta1": betas[0], "beta2": betas[1], "eps": eps}
        super().__init__(model, lr=lr, weight_decay=weight_decay, clip_grad=clip_grad, groups=groups, **own)


class Lion(OnModel):
    """Lion (Chen et al. 2023): `Lion(model, lr=1e-4)`, a third to a tenth of AdamW's rate. One moment."""

    name = "Lion"

    def __init__(
        self,
        model: Model,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.3,
        *,
        clip_grad: float = _DEFAULT.clip_grad,
        groups: Groups = None,
    ) -> None:
        own = {"beta1": betas[0], "beta2": betas[1]}
        super().__init__(model, lr=lr, weight_decay=weight_decay, clip_grad=clip_grad, groups=groups, **own)


class Muon(OnModel):
    """Muon (Liu et al. 2025) for the matrices of layers, AdamW with betas and eps for all else: `Muon(model, lr=1e-3)`.

    A matrix is looked at as a whole in every layout, and q, k and v each for itself.
    """

    name = torchs = "Muon"

    def __init__(
        self,
        model: Model,
        lr: float = _DEFAULT.lr,
        momentum: float = _DEFAULT.momentum,
        betas: tuple[float, float] = (_DEFAULT.beta1, _DEFAULT.beta2),
        eps: float = _DEFAULT.eps,
        weight_decay: float = _DEFAULT.weight_decay,
        *,
        clip_grad: float = _DEFAULT.clip_grad,
        groups: Groups = None,
    ) -> None:
        own = {"momentum": momentum, "beta1": betas[0], "beta2": betas[1], "eps": eps}
        super().__init__(model, lr=lr, weight_decay=weight_decay, clip_grad=clip_grad, groups=groups, **own)
