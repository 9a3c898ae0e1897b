"""Models of a user's own for `megapar verify`, right and wrong, each built by a function at the top of this module."""

from typing import Any

import torch
from torch import Tensor, nn

from megapar.config.schema import TrainConfig
from megapar.models.stage import TransformerStage, build_stage
from megapar.parallel.context import StageContext
from megapar.parallel.record import Constant, ParameterRecord
from megapar.parallel.weight_grad import owned_op


class Cube(torch.autograd.Function):
    """x^3."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 3 * ctx.saved_tensors[0] ** 2


class WrongCube(Cube):
    """The same, and its gradient without the 3."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0] ** 2


class Single(torch.autograd.Function):
    """x^3 in fp32, in whatever dtype x is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x.float() ** 3).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return (grad.float() * 3 * ctx.saved_tensors[0].float() ** 2).to(grad.dtype)


class WrongSingle(Single):
    """The same, and its gradient without the 3."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return Single.backward(ctx, grad) / 3


class Adapter(nn.Module):
    """A layer, and behind it plain torch around a function."""

    def __init__(self, layer: nn.Module, hidden: int, function: Any) -> None:
        super().__init__()
        self.layer, self.function = layer, function
        self.down, self.norm, self.up = nn.Linear(hidden, 5), nn.LayerNorm(5), nn.Linear(5, hidden)

    def forward(self, x: Tensor, tokens: Any) -> Tensor:
        x = self.layer(x, tokens)
        return x + self.up(torch.relu(self.function(self.norm(self.down(x)))))


def _adapted(config: TrainConfig, context: StageContext, function: Any) -> TransformerStage:
    stage = build_stage(config, context)
    for index in list(stage.layers):
        stage.layers[index] = Adapter(stage.layers[index], config.model.hidden, function).to(context.dtype)
    return stage


def right(config: TrainConfig, context: StageContext) -> TransformerStage:
    return _adapted(config, context, Cube.apply)


def right_in_fp32(config: TrainConfig, context: StageContext) -> TransformerStage:
    return _adapted(config, context, Single.apply)


def wrong_in_fp32(config: TrainConfig, context: StageContext) -> TransformerStage:
    return _adapted(config, context, WrongSingle.apply)


def wrong_function(config: TrainConfig, context: StageContext) -> TransformerStage:
    return _adapted(config, context, WrongCube.apply)


def detached(config: TrainConfig, context: StageContext) -> TransformerStage:
    """No function is wrong, and a part of the gradient is lost all the same."""
    return _adapted(config, context, lambda x: x * torch.tanh(x).detach())


class Times:
    """y = x * weight * factor, with the weight's gradient times `slip`."""

    def __init__(self, factor: float, slip: float) -> None:
        self.factor, self.slip = factor, slip

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * weight * self.factor

    def input_grad(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return grad * weight * self.factor

    def add_weight_grad(self, grad: Tensor, x: Tensor, into: Tensor) -> None:
        into.add_((grad * x).sum(0, dtype=into.dtype), alpha=self.factor * self.slip)


class Scaled(nn.Module):
    """The MLP, and a weight of every channel behind it."""

    def __init__(self, context: StageContext, mlp: nn.Module, name: str, hidden: int, slip: float) -> None:
        super().__init__()
        self.context, self.mlp, self.op = context, mlp, Times(2.0, slip)
        self.owner = context.parameter(self, "weight", ParameterRecord(f"{name}.weight", (hidden,), Constant(1.0)))

    def forward(self, x: Tensor) -> Tensor:
        return owned_op(self.op, self.mlp(x), self.owner, self.context.weight_grads)


def one_layer_wrong(config: TrainConfig, context: StageContext) -> TransformerStage:
    """The last layer looks like the others, and is wrong."""
    stage: Any = build_stage(config, context)
    for index, layer in stage.layers.items():
        slip = 1.5 if int(index) == config.model.layers - 1 else 1.0
        layer.mlp = Scaled(context, layer.mlp, f"layers.{index}.scale", config.model.hidden, slip)
    return stage


class Leans(nn.Module):
    """Runs only within a call of `pushed`, which leaves it a number."""

    def __init__(self) -> None:
        super().__init__()
        self.left: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return x * self.left.pop()

    def pushed(self, x: Tensor) -> Tensor:
        self.left.append(2.0)
        return self(x)


class Holds(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.leans = layer, Leans()

    def forward(self, x: Tensor, tokens: Any) -> Tensor:
        return self.leans.pushed(self.layer(x, tokens))


def not_alone(config: TrainConfig, context: StageContext) -> TransformerStage:
    """The last layer holds a module that can't be called outside of it."""
    stage = build_stage(config, context)
    last = str(config.model.layers - 1)
    stage.layers[last] = Holds(stage.layers[last])
    return stage


def fails(config: TrainConfig, context: StageContext) -> TransformerStage:
    raise RuntimeError("no such width")
