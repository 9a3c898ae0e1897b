"""Our AdamW around a model of the library."""

from typing import Any

import torch

from megapar.config.errors import UserError
from megapar.config.keys import check_values
from megapar.config.parse import parse
from megapar.config.schema import OptimConfig, TrainConfig
from megapar.library.model import Model
from megapar.optim.optimizer import Optimizer, StepResult

_DEFAULT = OptimConfig()


class AdamW:
    """AdamW as `megapar train` has it, for every dtype and layout: `AdamW(model, lr=1e-3)`.

    Other than torch's it clips by the global gradient norm (clip_grad; 0: not), weight decay leaves norms and biases
    alone, bf16 parameters have fp32 weights beside them, and a step whose gradients are not finite changes nothing.
    A parameter without a gradient counts as one whose gradient is zero. `lr` may be set between steps.
    """

    def __init__(
        self,
        model: Model,
        lr: float = _DEFAULT.lr,
        betas: tuple[float, float] = (_DEFAULT.beta1, _DEFAULT.beta2),
        eps: float = _DEFAULT.eps,
        weight_decay: float = _DEFAULT.weight_decay,
        *,
        clip_grad: float = _DEFAULT.clip_grad,
    ) -> None:
        if not isinstance(model, Model):
            problem = f"expects the model that megapar.build made, not {type(model).__name__}"
            raise UserError(f"AdamW: {problem}; for other parameters use torch.optim.AdamW")
        values = {"lr": lr, "beta1": betas[0], "beta2": betas[1], "eps": eps}
        config: Any = parse(TrainConfig, {"optim": values | {"weight_decay": weight_decay, "clip_grad": clip_grad}})
        check_values(config)
        self.model, self.lr = model, lr
        self._optimizer = Optimizer(model.part.buffers, model.sync.owned, config.optim)
        model.gradients.owned = True
        model.register_load_state_dict_post_hook(lambda *unused: self.refresh())

    def step(self) -> StepResult:
        """Clip and update. Collective. Returns the gradient norm before clipping, and whether the step was skipped.

        Raises UserError where there are no gradients, and for a frozen parameter, which weight decay would change.
        """
        gradients, parameters = self.model.gradients, self.model.part.context.parameters
        if frozen := [local.name for local in parameters if not local.tensor.requires_grad]:
            raise UserError(
                f"AdamW: {frozen[0]} is frozen, and its buffer is updated as a whole; use torch.optim.AdamW"
            )
        if not any(gradients.has(local) for local in parameters):
            raise UserError("AdamW: there are no gradients; call loss.backward() or model.forward_backward first")
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
