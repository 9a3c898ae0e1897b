"""A matmul and its collective over tensor-parallel ranks, as one differentiable function each.

Shapes are per rank. R is the size of the axis, T tokens, I and O this rank's input and output features; the weight w is
[O, I]. Every function has a dual, which is its backward; weight gradients need no collective.

| function                | x -> y             | forward                | dual: input gradient   | weight gradient |
|-------------------------|--------------------|------------------------|------------------------|-----------------|
| `copy_matmul`           | [T, I] -> [T, O]   | matmul                 | matmul, all-reduce     | meanwhile       |
| `matmul_all_reduce`     | [T, I] -> [T, O]   | matmul, all-reduce     | matmul                 | after it        |
| `all_gather_matmul`     | [T/R, I] -> [T, O] | all-gather, matmul     | matmul, reduce-scatter | meanwhile       |
| `matmul_reduce_scatter` | [T, I] -> [T/R, O] | matmul, reduce-scatter | all-gather, matmul     | after it        |

The first two are a column-parallel and a row-parallel linear layer, the others the same under sequence parallelism. How
a matmul and its collective are run is the engine's business (`parallel/engines.py`): the numbers are the same.
Source: Shoeybi et al. 2019, section 3; Korthikanti et al. 2022, section 4.2.2.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megapar.kernels.comm.symmetric import SymmetricMemory
from megapar.kernels.matmul import add_matmul, matmul
from megapar.mesh import Axis, Mesh
from megapar.parallel.engines import Engine, Operation, Serial, choose, sharing_memory
from megapar.parallel.function import apply
from megapar.parallel.weight_grad import LocalParameter, WeightGrads

T = TypeVar("T")


@dataclass
class Overlap:
    """How one layer's matmul meets its peers.

    requested: parallel.tp_overlap. owner and weight_grads: where the weight's gradient goes; without an owner it is
    autograd's. memory: makes what the symmetric engine works in. ran: which engine ran, by direction (forward,
    backward), as text.
    """

    axis: Axis
    requested: str = "auto"
    owner: LocalParameter | None = None
    weight_grads: WeightGrads | None = None
    memory: Callable[[], SymmetricMemory] | None = None
    ran: dict[str, str] = field(default_factory=dict)

    def engine(self, direction: str, operation: Operation, x: Tensor, w: Tensor) -> Engine:
        """The engine for an operation on x [.., K] and w [K, N] of this rank."""
        if self.axis.size == 1:
            return Serial()
        engine = choose(self.requested, operation, x, w, self.axis.size, memory=self.memory)
        self.ran[direction] = str(engine)
        return engine


class Overlaps:
    """Those of all tensor-parallel layers of a rank, and the memory that its peers share for the symmetric engine."""

    def __init__(self, mesh: Mesh, requested: str, weight_grads: WeightGrads) -> None:
        self.mesh, self.requested, self.weight_grads = mesh, requested, weight_grads
        self._of: dict[tuple[int, str], Overlap] = {}
        self._memory: SymmetricMemory | None = None

    def of(self, stage: int, owner: LocalParameter) -> Overlap:
        """How the matmul with this parameter meets its peers."""
        made = Overlap(self.mesh["tp"], self.requested, owner, self.weight_grads, self.shared_memory)
        self._of[stage, owner.name] = made
        return made

    def shared_memory(self) -> SymmetricMemory:
        """What tensor-parallel peers share for the symmetric engine. The first call makes it and is collective."""
        if self._memory is None:
            group = self.mesh["tp"].group
            assert group is not None
            with sharing_memory():
                self._memory = SymmetricMemory(group, self.mesh.device, self.mesh.timeout_s)
        return self._memory

    def ran(self) -> dict[str, dict[str, str]]:
        """Which engine ran the matmuls of this rank that have a collective, by weight and direction."""
        return {name: made.ran for (_, name), made in self._of.items() if made.ran}

    def check_peers(self) -> None:
        """Raise PeerTimeout if a kernel waited in vain for a peer: what it computed then must go nowhere."""
        if self._memory is not None:
            self._memory.check(finished=True)

    def close(self) -> None:
        """Give back the memory that peers share. Collective."""
        if self._memory is not None:
            self._memory.close()


def copy_matmul(x: Tensor, w: Tensor, overlap: Overlap) -> Tensor:
    """x @ w.T: x [T, I], the same on every rank, -> [T, O]. Dual: all-reduce of the input gradient over the axis."""
    return apply(_CopyMatmul, x, w, overlap)


def matmul_all_reduce(x: Tensor, w: Tensor, overlap: Overlap) -> Tensor:
    """The sum over the axis of x @ w.T: x [T, I] -> [T, O], the same on every rank. Dual: no collective."""
    return apply(_MatmulAllReduce, x, w, overlap)


def all_gather_matmul(x: Tensor, w: Tensor, overlap: Overlap) -> Tensor:
    """gathered x @ w.T: x [T/R, I] -> [T, O], rank after rank. Dual: reduce-scatter of the input gradient.

    The gathered x is kept for the weight gradient.
    """
    return _AllGatherMatmul.apply(x, w, overlap)


def matmul_reduce_scatter(x: Tensor, w: Tensor, overlap: Overlap) -> Tensor:
    """This rank's rows of the sum over the axis of x @ w.T: x [T, I] -> [T/R, O]. Dual: all-gather of the gradient.

    Raises ValueError where R does not divide T.
    """
    if len(x) % overlap.axis.size:
        raise ValueError(f"matmul_reduce_scatter: {len(x)} rows over {overlap.axis.size} ranks; need a multiple")
    return _MatmulReduceScatter.apply(x, w, overlap)


def _nothing() -> None:
    pass


class _WeightGradient:
    """Computes a weight gradient when called: into the owner's main gradient, or as `value` for autograd."""

    def __init__(self, overlap: Overlap, wanted: bool, dy: Tensor, x: Tensor) -> None:
        self.overlap, self.wanted, self.dy, self.x = overlap, wanted, dy, x
        self.value: Tensor | None = None

    def __call__(self) -> None:
        dy, x, owner = self.dy, self.x, self.overlap.owner
        if owner is not None:
            assert self.overlap.weight_grads is not None
            add_to, write = (partial(self._into, accumulate=accumulate) for accumulate in (True, False))
            self.overlap.weight_grads.submit(add_to, owner, write=write)
        elif self.wanted:
            self.value = self._timed(lambda: matmul(dy.t(), x))

    def _into(self, into: Tensor, accumulate: bool) -> None:
        self._timed(lambda: add_matmul(into, self.dy.t(), self.x, accumulate=accumulate))

    def _timed(self, multiply: Callable[[], T]) -> T:
        with self.overlap.axis.timeline.span("matmul", "weight gradient", fine=True):
            return multiply()


class _CopyMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, overlap: Overlap) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.overlap = overlap
        return matmul(x, w.t(), aligned=True)  # no collective takes it

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, w = ctx.saved_tensors
        gradient = _WeightGradient(ctx.overlap, ctx.needs_input_grad[1], dy, x)
        if not ctx.needs_input_grad[0]:
            gradient()
            return None, gradient.value, None
        engine = ctx.overlap.engine("backward", "matmul_all_reduce", dy, w)
        dx = engine.matmul_all_reduce(dy, w, ctx.overlap.axis, gradient)
        return dx, gradient.value, None


class _MatmulAllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, overlap: Overlap) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.overlap = overlap
        engine = overlap.engine("forward", "matmul_all_reduce", x, w.t())
        return engine.matmul_all_reduce(x, w.t(), overlap.axis, _nothing)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, w = ctx.saved_tensors
        dx = matmul(dy, w) if ctx.needs_input_grad[0] else None
        gradient = _WeightGradient(ctx.overlap, ctx.needs_input_grad[1], dy, x)
        gradient()
        return dx, gradient.value, None


class _AllGatherMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, overlap: Overlap) -> Tensor:
        engine = overlap.engine("forward", "all_gather_matmul", x, w.t())
        y, gathered = engine.all_gather_matmul(x, w.t(), overlap.axis)
        ctx.save_for_backward(gathered, w)
        ctx.overlap = overlap
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        gathered, w = ctx.saved_tensors
        gradient = _WeightGradient(ctx.overlap, ctx.needs_input_grad[1], dy, gathered)
        if not ctx.needs_input_grad[0]:
            gradient()
            return None, gradient.value, None
        engine = ctx.overlap.engine("backward", "matmul_reduce_scatter", dy, w)
        dx = engine.matmul_reduce_scatter(dy, w, ctx.overlap.axis, gradient)
        return dx, gradient.value, None


class _MatmulReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, overlap: Overlap) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.overlap = overlap
        engine = overlap.engine("forward", "matmul_reduce_scatter", x, w.t())
        return engine.matmul_reduce_scatter(x, w.t(), overlap.axis, _nothing)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, w = ctx.saved_tensors
        engine = ctx.overlap.engine("backward", "all_gather_matmul", dy, w)
        dx, gathered = engine.all_gather_matmul(dy, w, ctx.overlap.axis)
        gradient = _WeightGradient(ctx.overlap, ctx.needs_input_grad[1], gathered, x)
        gradient()
        return dx if ctx.needs_input_grad[0] else None, gradient.value, None
