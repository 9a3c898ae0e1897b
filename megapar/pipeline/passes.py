"""What an action computes: a stage's forward pass, and backward from where it ended."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megapar.pipeline.stage import Tensors


@dataclass(frozen=True)
class Forwarded:
    """A forward pass. outputs: without a graph. names, edges: of those that have a gradient, where backward begins."""

    received: Tensors
    outputs: Tensors
    names: list[str]
    edges: list[GradientEdge]


def forward(compute: Callable[[Tensors], Tensors], received: Tensors, training: bool) -> Forwarded:
    """compute(received) -> outputs, with a gradient of whatever floating point was received."""
    for tensor in received.values():
        tensor.requires_grad_(training and tensor.is_floating_point())
    outputs = compute(received)
    names = [name for name, tensor in outputs.items() if tensor.requires_grad]
    edges = [get_gradient_edge(outputs[name]) for name in names]
    return Forwarded(received, {name: tensor.detach() for name, tensor in outputs.items()}, names, edges)


def backward(forwarded: Forwarded, grads: Sequence[Tensor]) -> Tensors:
    """From the gradients of `forwarded.names` to those of what was received."""
    torch.autograd.backward(forwarded.edges, grads)
    return {
        name: tensor.grad if tensor.grad is not None else torch.zeros_like(tensor)
        for name, tensor in forwarded.received.items()
        if tensor.requires_grad
    }
