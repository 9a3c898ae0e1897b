"""What a model's operations and modules are called with."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from megapar.parallel.overlap import _AllGatherMatmul, _CopyMatmul, _MatmulAllReduce, _MatmulReduceScatter
from megapar.parallel.weight_grad import LocalParameter
from megapar.pipeline.stage import Stage
from megapar.tasks.kind import Task

SEED = 17
# In one process the linear layers of sequence parallelism are those without it: these are what its ranks would run.
_SEQUENCE_PARALLEL = {_CopyMatmul: _AllGatherMatmul, _MatmulAllReduce: _MatmulReduceScatter}


@dataclass
class Call:
    """A call that was made. arguments: its tensors' values before it, flattened; inputs: those with a gradient;
    weights: parameters that it may read; plain: the forward as autograd can differentiate it, if it can."""

    where: str
    what: str
    run: Callable[..., Any]
    plain: Callable[..., Any] | None
    arguments: list[Any]
    spec: Any
    inputs: list[int]
    weights: list[LocalParameter]
    signature: tuple[Any, ...]
    inner: list["Call"] = field(default_factory=list)

    def make(self, values: dict[int, Tensor], run: Callable[..., Any] | None = None) -> list[Tensor]:
        """Its floating outputs with these inputs. Every tensor is fresh, as a call may write to it."""
        leaves = [_fresh(values.get(at, leaf)) for at, leaf in enumerate(self.arguments)]
        args, kwargs = tree_unflatten(leaves, self.spec)
        torch.default_generator.manual_seed(SEED)  # of a module that draws, the same every time
        outputs = (run or self.run)(*args, **kwargs)
        return [out for out in tree_flatten(outputs)[0] if isinstance(out, Tensor) and out.is_floating_point()]


def record(stage: Stage, task: Task, parameters: Sequence[LocalParameter], sequence_parallel: bool) -> Call:
    """Run a model of one stage and its loss once, on an example of the task's. The whole, with the calls inside of it.

    parameters: the model's; sequence_parallel: its linear layers are also called as they are under that
    """
    batch = task.examples()[0]
    own = {id(parameter.tensor): parameter for parameter in parameters}
    paths = {id(module): path for path, module in stage.named_modules()}

    def model(received: Any, batch: Any) -> Tensor:
        return task.loss(stage(received, batch), batch)

    whole = _call("", "the whole model", model, None, ({}, batch), {}, own, parameters, ())
    open_calls = [whole]

    def begin(path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        of = {id(tensor) for tensor in module.parameters()}
        weights = [parameter for parameter in parameters if id(parameter.tensor) in of]
        name = type(module).__name__
        call = _call(path, name, module, None, args, kwargs, own, weights, (type(module),))
        open_calls[-1].inner.append(call)
        open_calls.append(call)

    def apply(cls: Any, original: Callable[..., Any], args: Any) -> Any:
        owners = [arg if isinstance(arg, LocalParameter) else own.get(id(arg)) for arg in args]
        weights = [owner for owner in dict.fromkeys(owners) if owner is not None]
        where = open_calls[-1].where
        if weights and (declared := paths.get(id(weights[0].module), "")).startswith(where):
            where = declared  # a module may be used by another method than its forward
        for function in (cls, _SEQUENCE_PARALLEL.get(cls) if sequence_parallel else None):
            if function is not None:
                signature = (function, *(arg if isinstance(arg, type) else type(arg) for arg in args))
                call = _call(
                    where, _name(function, args), function.apply, _forward(function), args, {},
                    own, weights, signature,
                )  # fmt: skip
                open_calls[-1].inner.append(call)
        return original(*args)

    handles = []
    for path, module in stage.named_modules():
        if path:
            handles += [
                module.register_forward_pre_hook(
                    lambda module, args, kwargs, path=path: begin(path, module, args, kwargs), with_kwargs=True
                ),
                module.register_forward_hook(lambda module, args, output: open_calls.pop() and None),
            ]
    try:
        with _watching_functions(apply):
            model({}, batch)
    finally:
        for handle in handles:
            handle.remove()
    return whole


def _call(
    where: str,
    what: str,
    run: Callable[..., Any],
    plain: Callable[..., Any] | None,
    args: Any,
    kwargs: Any,
    own: dict[int, LocalParameter],
    weights: Sequence[LocalParameter],
    signature: tuple[Any, ...],
) -> Call:
    """own: the model's parameters by the identity of their tensors, which no call gets a copy of."""
    leaves, spec = tree_flatten((tuple(args), dict(kwargs)))
    inputs, arguments = [], []
    for at, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and id(leaf) not in own:
            if leaf.requires_grad and leaf.is_floating_point():
                inputs.append(at)
            leaf = leaf.detach().clone()
        arguments.append(leaf)
    shapes = tuple(tuple(leaf.shape) if isinstance(leaf, Tensor) else None for leaf in arguments)
    signature = (*signature, shapes, tuple(parameter.shape for parameter in weights))
    return Call(where, what, run, plain, arguments, spec, inputs, list(weights), signature)


def _fresh(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) and not isinstance(leaf, nn.Parameter) else leaf


def _name(function: Any, args: Sequence[Any]) -> str:
    """An operation's: of an owned one that of its three functions."""
    for arg in args:
        if hasattr(arg, "add_weight_grad"):
            return arg.__name__ if isinstance(arg, type) else type(arg).__name__
    return function.__name__.lstrip("_").removeprefix("Owned")


class _Context:
    """What a forward does with its context, for nothing."""

    needs_input_grad = (True,) * 64

    def save_for_backward(self, *tensors: Any) -> None: ...
    def mark_dirty(self, *tensors: Any) -> None: ...
    def mark_non_differentiable(self, *tensors: Any) -> None: ...
    def set_materialize_grads(self, value: bool) -> None: ...


def _forward(function: Any) -> Callable[..., Any]:
    """The forward of an autograd function, as a plain one."""
    if function.setup_context is not torch.autograd.Function.setup_context:
        return function.forward
    return lambda *args: function.forward(_Context(), *args)


@contextmanager
def _watching_functions(seen: Callable[..., Any]) -> Iterator[None]:
    """Have seen(function, its apply, args) called in the place of every autograd function but torch's own.

    Below `Function`, so that an `apply` that somebody has kept (`cube = Cube.apply`) is seen, too.
    """
    base: Any = torch.autograd.Function.__base__

    def apply(cls: Any, *args: Any) -> Any:
        run = super(base, cls).apply
        return run(*args) if cls.__module__.partition(".")[0] == "torch" else seen(cls, run, args)

    base.apply = classmethod(apply)
    try:
        yield
    finally:
        del base.apply
