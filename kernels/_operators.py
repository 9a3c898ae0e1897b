"""Operators that torch.compile and autograd see whole, and that cost nothing where neither looks.

A call through torch's dispatcher takes as long as many a kernel runs. It is needed where gradients are recorded, a
compiler traces, or a mode listens; `call` skips it where none does, which is most of a training step: what runs inside
of autograd functions, and all of backward.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

# operator -> (what it runs, places of the arguments that it changes)
_IMPLEMENTATIONS: dict[Any, tuple[Callable[..., Any], tuple[int, ...]]] = {}
_PLAIN = (Tensor, nn.Parameter)  # exactly these: not what stands for a tensor while something traces


def custom_op(name: str, mutates_args: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """torch.library.custom_op, for `call`."""

    def define(function: Callable[..., Any]) -> Any:
        op = torch.library.custom_op(name, function, mutates_args=mutates_args)
        names = list(inspect.signature(function).parameters)
        _IMPLEMENTATIONS[op] = (function, tuple(names.index(changed) for changed in mutates_args))
        return op

    return define


def call(op: Any, *arguments: Any) -> Any:
    """op(*arguments), without torch's dispatcher where nothing needs it."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or _watched(arguments):
        return op(*arguments)
    function, changed = _IMPLEMENTATIONS[op]
    result = function(*arguments)
    for place in changed:
        increment_version(arguments[place])  # so that autograd refuses what was kept of it, as the dispatcher has it
    return result


def _watched(arguments: tuple[Any, ...]) -> bool:
    """Whether a mode listens to operators, or an argument is no tensor with memory."""
    if torch._C._len_torch_dispatch_stack():
        return True
    return any(isinstance(x, Tensor) and (type(x) not in _PLAIN or x.is_meta) for x in arguments)
