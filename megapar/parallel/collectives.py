"""Collectives over an explicit axis, and their autograd forms: each names its dual.

Shapes are per rank. R is the size of the axis. On an axis of size 1 every function returns its input.

| forward              | function                | backward (the dual)   |
|----------------------|-------------------------|-----------------------|
| identity             | `copy_to_region`        | all-reduce            |
| all-reduce           | `reduce_from_region`    | identity              |
| all-gather dim 0     | `gather_tokens`         | reduce-scatter dim 0  |
| reduce-scatter dim 0 | `reduce_scatter_tokens` | all-gather dim 0      |

Source: Shoeybi et al. 2019 (Megatron-LM), section 3; Korthikanti et al. 2022, section 4.2 (sequence parallelism).
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megapar.mesh import Axis


def all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """Sum over the axis, in place. `x` is contiguous."""
    if axis.size > 1:
        with axis.blocked("all_reduce"):
            dist.all_reduce(x, group=axis.group)
    return x


def all_gather(x: Tensor, axis: Axis) -> Tensor:
    """[n, ...] -> [R*n, ...], rank after rank along dim 0."""
    if axis.size == 1:
        return x
    gathered = x.new_empty(axis.size * x.shape[0], *x.shape[1:])
    with axis.blocked("all_gather"):
        dist.all_gather_single(gathered, x.contiguous(), group=axis.group)
    return gathered


def reduce_scatter(x: Tensor, axis: Axis) -> Tensor:
    """[R*n, ...] -> [n, ...]: this rank's block along dim 0 of the sum."""
    if axis.size == 1:
        return x
    assert x.shape[0] % axis.size == 0, f"{x.shape[0]} rows over {axis.size} ranks"
    block = x.new_empty(x.shape[0] // axis.size, *x.shape[1:])
    with axis.blocked("reduce_scatter"):
        dist.reduce_scatter_single(block, x.contiguous(), group=axis.group)
    return block


class _CopyToRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return all_reduce(grad.contiguous().clone(), ctx.axis), None


class _ReduceFromRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis) -> Tensor:
        return all_reduce(x.contiguous().clone(), axis)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_gather(x, axis)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return reduce_scatter(grad, ctx.axis), None


class _ReduceScatterTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return reduce_scatter(x, axis)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return all_gather(grad, ctx.axis), None


def copy_to_region(x: Tensor, axis: Axis) -> Tensor:
    """Enter a region where every rank computes something else from the same input: [..] -> [..].

    Dual: all-reduce of the gradient. Inverse: `reduce_from_region`.
    """
    return _CopyToRegion.apply(x, axis) if axis.size > 1 else x


def reduce_from_region(x: Tensor, axis: Axis) -> Tensor:
    """Leave the region with the sum of all ranks' parts: [..] -> [..]. Dual: identity."""
    return _ReduceFromRegion.apply(x, axis) if axis.size > 1 else x


def gather_tokens(x: Tensor, axis: Axis) -> Tensor:
    """Enter from a sequence-parallel region: [T/R, H] -> [T, H]. Dual: reduce-scatter of the gradient."""
    return _GatherTokens.apply(x, axis) if axis.size > 1 else x


def reduce_scatter_tokens(x: Tensor, axis: Axis) -> Tensor:
    """Leave to a sequence-parallel region with this rank's tokens of the sum: [T, H] -> [T/R, H].

    Dual: all-gather of the gradient.
    """
    return _ReduceScatterTokens.apply(x, axis) if axis.size > 1 else x
