"""Collectives over an explicit axis, and their autograd forms: each names its dual.

Those of a matmul are in `parallel/overlap.py`.

Shapes are per rank. R is the size of the axis. On an axis of size 1 every function returns its input.

| forward              | function                | backward (the dual)   |
|----------------------|-------------------------|-----------------------|
| all-reduce           | `reduce_from_region`    | identity              |
| reduce-scatter dim 0 | `reduce_scatter_tokens` | all-gather dim 0      |
| all-gather dim 0     | `gather_tokens`         | this rank's part      |
| identity             | `copy_to_region`        | all-reduce            |
| all-gather dim 0     | `gather_into_region`    | reduce-scatter dim 0  |

Source: Shoeybi et al. 2019 (Megatron-LM), section 3; Korthikanti et al. 2022, section 4.2 (sequence parallelism).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megapar.mesh import Axis
from megapar.torch_compat import all_gather_single, reduce_scatter_single


@dataclass(frozen=True)
class Started:
    """A collective in flight. `wait` is timed as waiting; `finish` is what is left to compute after it.

    operands: kept until then. NCCL works on them on a stream of its own, which the allocator knows nothing of, and lets
    go of them at the first wait for the work, which may be an observer's. compare: with what the other ranks began
    """

    name: str
    axis: Axis
    work: dist.Work
    operands: list[object]
    finish: Callable[[], object] = lambda: None
    compare: Callable[[], None] = lambda: None

    def wait(self) -> None:
        with self.axis.blocked(self.name):
            self.work.wait()
        self.compare()
        self.operands.clear()
        self.finish()


def wait_for(started: Iterable[Started]) -> None:
    for one in started:
        one.wait()


def start_all_reduce(name: str, x: Tensor, axis: Axis) -> Started:
    """Begin to sum x over the axis, in place. `x` is contiguous."""
    return _start(name, axis, dist.all_reduce, x)


def start_all_gather(name: str, into: Tensor, x: Tensor, axis: Axis) -> Started:
    """Begin to write every rank's x [n, ...] to `into` [R*n, ...], rank after rank; both are contiguous."""
    return _start(name, axis, all_gather_single, into, x)


def start_all_gather_list(name: str, into: list[Tensor], x: Tensor, axis: Axis) -> Started:
    """Begin to write every rank's x, contiguous, to `into[rank]`, wherever that lies. NCCL gathers first and copies."""
    return _start(name, axis, dist.all_gather, into, x)


def start_reduce_scatter(name: str, into: Tensor, x: Tensor, axis: Axis) -> Started:
    """Begin to write this rank's block along dim 0 of the sum of x [R*n, ...] to `into` [n, ...].

    On the CPU every rank sends each block to its owner, which adds them in the order of ranks. Gloo's own operation
    takes 1.4 to 5 times as long (2 and 4 ranks, 64 KB to 16 MB, medians), and does a part of it before it returns.
    """
    if x.is_cuda:
        return _start(name, axis, reduce_scatter_single, into, x)
    blocks = x.new_empty(axis.size, *into.shape)
    started = start_all_to_all(name, blocks, x.view(blocks.shape), axis)
    return replace(started, finish=lambda: torch.sum(blocks, 0, out=into))


def start_all_to_all(name: str, into: Tensor, x: Tensor, axis: Axis) -> Started:
    """Begin to send block r of x [R, ...] to rank r and to write what rank r sends to block r of `into`."""
    return _start(name, axis, dist.all_to_all_single, into, x)


def _start(name: str, axis: Axis, collective: Callable[..., dist.Work], *operands: object) -> Started:
    start = partial(collective, *operands, group=axis.group, async_op=True)
    uneven = collective is dist.all_gather
    alike = [x for x in operands if isinstance(x, Tensor) and not uneven]
    compare = axis.announce(f"{name} by {collective.__name__}", *alike)
    return Started(name, axis, axis.timeline.in_flight(name, start), list(operands), compare=compare)


def all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """Sum over the axis, in place. `x` is contiguous."""
    if axis.size > 1:
        with axis.blocked("all_reduce", x):
            dist.all_reduce(x, group=axis.group)
    return x


def all_gather(x: Tensor, axis: Axis) -> Tensor:
    """[n, ...] -> [R*n, ...], rank after rank along dim 0."""
    if axis.size == 1:
        return x
    gathered = x.new_empty(axis.size * x.shape[0], *x.shape[1:])
    with axis.blocked("all_gather", x):
        all_gather_single(gathered, x.contiguous(), group=axis.group)
    return gathered


def reduce_scatter(x: Tensor, axis: Axis) -> Tensor:
    """[R*n, ...] -> [n, ...]: this rank's block along dim 0 of the sum."""
    if axis.size == 1:
        return x
    assert x.shape[0] % axis.size == 0, f"{x.shape[0]} rows over {axis.size} ranks"
    block = x.new_empty(x.shape[0] // axis.size, *x.shape[1:])
    start_reduce_scatter("reduce_scatter", block, x.contiguous(), axis).wait()
    return block


def all_to_all(x: Tensor, given: Sequence[int], taken: Sequence[int], axis: Axis) -> Tensor:
    """x [sum of given] -> [sum of taken]: given[r] elements, block after block, go to rank r; taken[r] come from it."""
    if axis.size == 1:
        return x
    into = x.new_empty(sum(taken))
    with axis.blocked("all_to_all", x[:0]):
        dist.all_to_all_single(into, x.contiguous(), list(taken), list(given), group=axis.group)
    return into


class _ReduceFromRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis) -> Tensor:
        return all_reduce(x.contiguous().clone(), axis)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


class _ReduceScatterTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return reduce_scatter(x, axis)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return all_gather(grad, ctx.axis), None


def reduce_from_region(x: Tensor, axis: Axis) -> Tensor:
    """Leave the region with the sum of all ranks' parts: [..] -> [..]. Dual: identity."""
    return _ReduceFromRegion.apply(x, axis) if axis.size > 1 else x


def reduce_scatter_tokens(x: Tensor, axis: Axis) -> Tensor:
    """Leave to a sequence-parallel region with this rank's tokens of the sum: [T, H] -> [T/R, H].

    Dual: all-gather of the gradient.
    """
    return _ReduceScatterTokens.apply(x, axis) if axis.size > 1 else x


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_gather(x, axis)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad.chunk(ctx.axis.size)[ctx.axis.index].contiguous(), None


def gather_tokens(x: Tensor, axis: Axis) -> Tensor:
    """All tokens on every rank of a sequence-parallel region, for what they all do alike: [T/R, H] -> [T, H].

    Dual: this rank's part of the gradient, which is the same on all of them.
    """
    return _GatherTokens.apply(x, axis) if axis.size > 1 else x


class _CopyToRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return all_reduce(grad.contiguous().clone(), ctx.axis), None


def copy_to_region(x: Tensor, axis: Axis) -> Tensor:
    """Enter the region with the same on every rank: [..] -> [..]. Dual: all-reduce of the gradient."""
    return _CopyToRegion.apply(x, axis) if axis.size > 1 else x


class _GatherIntoRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_gather(x, axis)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return reduce_scatter(grad.contiguous(), ctx.axis), None


def gather_into_region(x: Tensor, axis: Axis) -> Tensor:
    """Enter the region from a sequence-parallel one, with all tokens: [T/R, ..] -> [T, ..]. Dual: reduce-scatter."""
    return _GatherIntoRegion.apply(x, axis) if axis.size > 1 else x
