"""Weight gradients are explicit.

An op that owns a parameter computes its input gradient in backward and hands the computation of its weight gradient to
the rank's `WeightGrads`, which runs it at once (a full backward, B) or keeps it for later (I now, W later). The result
is added to the parameter's main gradient, a view of one flat buffer, and nowhere else.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from megapar.config.model import Part
from megapar.parallel.function import apply
from megapar.parallel.record import ParameterRecord, Shard


@dataclass(frozen=True)
class Piece:
    """One logical parameter's shard inside a local parameter: rows [start, stop) of the local tensor."""

    record: ParameterRecord
    shard: Shard
    start: int
    stop: int


@dataclass(eq=False)
class LocalParameter:
    """One tensor of this rank: one shard, or several logical parameters' shards stacked along dim 0 (q, k and v).

    `tensor` is the parameter that ops read (compute dtype), `grad` its main gradient (at least fp32). Both are views of
    the rank's flat buffers, set when those are made. `uses` counts the ops that add to the gradient in one backward.
    `stage`: the pipeline stage that declared it; `part`: the part of the model that it belongs to, None if to none.
    `frozen`: it is not trained, and has no gradient.
    """

    module: nn.Module
    attribute: str
    shape: tuple[int, ...]
    pieces: list[Piece]
    widest: int  # elements on the rank of the stage that holds most: the same number on all of them
    stage: int = 0
    part: Part | None = None
    frozen: bool = False
    uses: int = 1
    aliases: list[tuple[nn.Module, str]] = field(default_factory=list)  # further places of a shared plain parameter
    values: Tensor | None = None  # of a plain module's parameter
    tensor: Tensor = field(default_factory=lambda: torch.empty(0))
    grad: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def tie(self) -> str | None:
        """The tie group, the same for all pieces."""
        return self.pieces[0].record.tie

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def is_layer_matrix(self) -> bool:
        """Whether it is a matrix that a layer multiplies by, and neither a table nor the product to logits."""
        in_layer = self.part is not None and self.part.kind == "layer"
        return in_layer and len(self.shape) == 2 and not self.pieces[0].record.table

    @property
    def name(self) -> str:
        return "+".join(piece.record.name for piece in self.pieces)


@dataclass(frozen=True)
class Submitted:
    """A computation of weight gradients: add_to(*main_grads) adds them in place; write(*main_grads), if there is one,
    puts them in the place of what is there."""

    add_to: Callable[..., None]
    write: Callable[..., None] | None
    parameters: tuple[LocalParameter, ...]


class WeightGrads:
    """Runs or queues the weight-gradient computations of a rank's stages.

    The first of a step takes the place of what is left in a main gradient: it is written, which spares clearing and
    reading, or added to zeros.
    """

    def __init__(self) -> None:
        self.left_over: set[LocalParameter] = set()  # whose main gradients are the step before's
        self.on_added: Callable[[LocalParameter], None] = lambda parameter: None
        self._queued: dict[tuple[int, int], list[Submitted]] = defaultdict(list)
        self._defer_to: tuple[int, int] | None = None

    def begin(self, parameters: Iterable[LocalParameter]) -> None:
        """From now on what the main gradients of these hold counts as nothing."""
        self.left_over = set(parameters)

    def clear_unused(self, parameters: Iterable[LocalParameter]) -> None:
        """Set the main gradients of those to zero that nothing has been added to since `begin`."""
        for parameter in self.left_over.intersection(parameters):
            parameter.grad.zero_()
        self.left_over.difference_update(parameters)

    def defer(self, work: tuple[int, int] | None) -> None:
        """From now on queue under this (stage, micro-batch), or with None run at once."""
        self._defer_to = work

    def submit(
        self,
        add_to: Callable[..., None],
        *parameters: LocalParameter,
        write: Callable[..., None] | None = None,
    ) -> None:
        """`add_to(*main_grads)` adds this use's gradients to the parameters' main gradients, in place.

        write: the same where they hold nothing yet, if that is cheaper than to add to zeros
        Of frozen parameters nothing is computed; those of one call are all frozen, or none is.
        """
        if parameters[0].frozen:
            return
        submitted = Submitted(add_to, write, parameters)
        if self._defer_to is None:
            self._run(submitted)
        else:
            self._queued[self._defer_to].append(submitted)

    def submit_vectors(self, gradients: Callable[[], Sequence[Tensor]], *parameters: LocalParameter) -> None:
        """The same of gradients that are computed apart, as a norm's: `gradients()` has one for each parameter."""

        def put(*main_grads: Tensor, into: Callable[[Tensor, Tensor], object]) -> None:
            for main_grad, gradient in zip(main_grads, gradients(), strict=True):
                into(main_grad, gradient)

        self.submit(partial(put, into=Tensor.add_), *parameters, write=partial(put, into=Tensor.copy_))

    def add(self, parameter: LocalParameter, grad: Tensor) -> None:
        """Add a gradient that autograd has computed already."""
        self.clear_unused([parameter])
        parameter.grad.add_(grad.view(parameter.shape))
        self.on_added(parameter)

    def run(self, stage: int, microbatch: int) -> None:
        """W: run what the I of this stage and micro-batch has queued."""
        self.run_all(self.withdraw(stage, microbatch))

    def withdraw(self, stage: int, microbatch: int) -> list[Submitted]:
        """What the I of this stage and micro-batch has queued, which is no longer queued then."""
        return self._queued.pop((stage, microbatch), [])

    def run_all(self, queued: Iterable[Submitted]) -> None:
        with torch.no_grad():
            for submitted in queued:
                self._run(submitted)

    def _run(self, submitted: Submitted) -> None:
        parameters, compute = submitted.parameters, submitted.add_to
        if submitted.write is not None and self.left_over.issuperset(parameters):
            self.left_over.difference_update(parameters)
            compute = submitted.write
        self.clear_unused(parameters)
        compute(*(parameter.grad for parameter in parameters))
        for parameter in parameters:
            self.on_added(parameter)


class WeightOp(Protocol):
    """An op with one input and one parameter, as three pure functions.

    forward(x, weight) -> y
    input_grad(grad_y, x, weight) -> gradient of x
    add_weight_grad(grad_y, x, into): adds the weight's gradient to `into`, accumulating in its dtype
    """

    def forward(self, x: Tensor, weight: Tensor) -> Tensor: ...
    def input_grad(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor | None: ...
    def add_weight_grad(self, grad: Tensor, x: Tensor, into: Tensor) -> None: ...


class _OwnedOp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, op: WeightOp, owner: LocalParameter, weight_grads: WeightGrads):
        ctx.save_for_backward(x, weight)
        ctx.op, ctx.owner, ctx.weight_grads = op, owner, weight_grads
        return op.forward(x, weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        op = ctx.op
        grad_x = op.input_grad(grad, x, weight) if ctx.needs_input_grad[0] else None
        ctx.weight_grads.submit(lambda into: op.add_weight_grad(grad, x, into), ctx.owner)
        return grad_x, None, None, None, None


def owned_op(op: WeightOp, x: Tensor, owner: LocalParameter, weight_grads: WeightGrads) -> Tensor:
    """Apply `op` to x and the owner's tensor; in backward its weight gradient goes to `weight_grads`."""
    return apply(_OwnedOp, x, owner.tensor, op, owner, weight_grads)


class AddBias:
    """y = x + bias: x [T, F], bias [F]."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return x + weight

    @staticmethod
    def input_grad(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return grad

    @staticmethod
    def add_weight_grad(grad: Tensor, x: Tensor, into: Tensor) -> None:
        into.add_(grad.sum(0, dtype=into.dtype))


class Multiply:
    """y = x @ weight.T: x [T, in], weight [out, in] -> [T, out]."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight.t()

    @staticmethod
    def input_grad(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return grad @ weight

    @staticmethod
    def add_weight_grad(grad: Tensor, x: Tensor, into: Tensor) -> None:
        into.addmm_(grad.t().to(into.dtype), x.to(into.dtype))


class Lookup:
    """Rows of a table: x [T] row numbers, weight [V, H] -> [T, H]; a row number outside [0, V) gives zeros."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        outside = (x < 0) | (x >= weight.shape[0])
        return weight[x.masked_fill(outside, 0)].masked_fill_(outside.unsqueeze(1), 0.0)

    @staticmethod
    def input_grad(grad: Tensor, x: Tensor, weight: Tensor) -> None:
        return None

    @staticmethod
    def add_weight_grad(grad: Tensor, x: Tensor, into: Tensor) -> None:
        # To choose the rows inside would have the host wait until the device has counted them.
        outside = (x < 0) | (x >= into.shape[0])
        into.index_add_(0, x.masked_fill(outside, 0), grad.to(into.dtype).masked_fill(outside.unsqueeze(1), 0.0))
