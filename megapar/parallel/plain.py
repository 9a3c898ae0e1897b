"""Plain torch modules inside a stage: their parameters are taken over, replicated, with gradients from autograd."""

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor, nn

from megapar.parallel.context import StageContext
from megapar.parallel.record import Given, ParameterRecord
from megapar.parallel.weight_grad import LocalParameter, Piece, WeightGrads


class HasModules(Protocol):
    """A torch module, for what is asked of it here."""

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...


def adopt(stage: HasModules, context: StageContext) -> None:
    """Take over the parameters of the plain modules inside a stage.

    Their values are drawn anew by the module's own `reset_parameters`, seeded with its path; a module without one keeps
    what it was built with, which must then be the same on every rank. A parameter that several modules share stays one.
    A frozen one (requires_grad=False) and the modules' buffers stay as they are, in the compute dtype; they are not in
    checkpoints.
    """
    adopted: dict[int, LocalParameter] = {}
    known = {(id(parameter.module), parameter.attribute) for parameter in context.parameters}
    for path, module in stage.named_modules():
        declared = [name for name, tensor in module._parameters.items() if tensor is not None]
        plain = [name for name in declared if (id(module), name) not in known]
        reset = getattr(module, "reset_parameters", None)
        if plain and callable(reset):
            with context.seeded(path):
                reset()
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(context.device, context.dtype if buffer.is_floating_point() else None))
        for attribute in plain:
            tensor = getattr(module, attribute)
            if id(tensor) in adopted:
                adopted[id(tensor)].aliases.append((module, attribute))
            elif tensor.requires_grad:
                adopted[id(tensor)] = _adopted(module, attribute, f"{path}.{attribute}" if path else attribute, context)
            else:
                tensor.data = tensor.data.to(context.device, context.dtype)


def _adopted(module: nn.Module, attribute: str, name: str, context: StageContext) -> LocalParameter:
    tensor = getattr(module, attribute)
    record = ParameterRecord(name, tuple(tensor.shape) or (1,), Given())
    piece = Piece(record, context.shard(record), 0, record.shape[0])
    local = LocalParameter(module, attribute, record.shape, [piece], record.numel, context.stage)
    local.values = tensor.detach().clone()
    context.parameters.append(local)
    return local


def hook_plain_gradient(parameter: LocalParameter, weight_grads: WeightGrads) -> None:
    """Move what autograd leaves in `.grad` of a plain module's parameter to its main gradient."""

    def move(tensor: Tensor) -> None:
        assert tensor.grad is not None
        weight_grads.add(parameter, tensor.grad)
        tensor.grad = None

    parameter.tensor.register_post_accumulate_grad_hook(move)
