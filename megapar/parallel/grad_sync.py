"""Gradient reduction: which sums a main gradient still needs, and when each can start.

A main gradient holds the sum over this rank's micro-batches. Three more sums follow from the records:
1. over axes that could have divided the parameter and did not, where ranks saw different tokens or heads
   (`ParameterRecord.sees`): parameters that every rank holds, under sequence parallelism; and the copies of a kv head;
2. over the stages that hold a copy of a tied parameter;
3. over the bucket's axis, started while the rest of the last backward still runs.
With ZeRO-1 the third is a reduce-scatter, and each rank is left with the slice whose optimizer state it owns.

Sums over the same ranks must start in the same order on all of them, whichever parameters their micro-batches used. So
buckets start in the order in which a step that uses every parameter completes them, a late one holding up those behind
it, and tied ones at the end, by name.
"""

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from megapar.config.errors import UserError
from megapar.mesh import Axis
from megapar.parallel.buffers import Bucket, StageBuffers
from megapar.parallel.collectives import all_reduce
from megapar.parallel.compression import Reduction, Waiting, matrices_of, reduction
from megapar.parallel.weight_grad import LocalParameter, Piece
from megapar.schedule.actions import Schedule


@dataclass(eq=False)
class _Pending:
    """A bucket's reduction. number: of the bucket; partial: the first sums of all, by axis; into: where the sum goes;
    missing: parameters whose contributions are not all in; started: what runs; left_over: what is added to the next
    gradient, once."""

    number: int
    bucket: Bucket
    partial: list[tuple[Axis, list[Tensor]]]
    reduction: Reduction | None
    into: Tensor
    missing: int = 0
    started: Waiting | None = None
    left_over: Tensor | None = None


class GradSync:
    """Reduces the main gradients of a rank's stages, once per step.

    check: a parameter that some micro-batch did not use is an error; else its gradient is zero there.
    owned: of every bucket the reduced gradients that this rank owns, the same memory every step.
    partial_sums: of every bucket the first sums, by axis, of views of the main gradients.
    """

    def __init__(
        self, buffers: StageBuffers, compression: str = "none", powersgd_rank: int = 4, *, check: bool = False
    ) -> None:
        self.buffers, self.mesh, self.check = buffers, buffers.mesh, check
        self.owned = buffers.take_owned(buffers.grads)
        if buffers.zero:
            self.owned = [part.clone() for part in self.owned]
        self.partial_sums = [self._partial_sums(bucket) for bucket in buffers.buckets]
        self._pending = [
            _Pending(number, bucket, sums, None, self.owned[number] if buffers.zero else bucket.grads)
            for number, (bucket, sums) in enumerate(zip(buffers.buckets, self.partial_sums, strict=True))
        ]
        for pending in self._pending:
            axis = pending.bucket.axis
            if axis.size > 1:
                matrices = matrices_of(pending.bucket)
                pending.reduction = reduction(compression, axis, matrices, pending.bucket.size, powersgd_rank)
        self._of = {parameter: pending for pending in self._pending for parameter in pending.bucket.offsets}
        self._expected = 0
        self._held = False
        self._added: Counter[LocalParameter] = Counter()
        self._queue: deque[_Pending] = deque()
        buffers.context.weight_grads.on_added = self._on_added

    def start(self, schedule: Schedule) -> None:
        """Begin a step: main gradients count as empty; every use of a parameter adds once per micro-batch."""
        self.buffers.context.weight_grads.begin(self._of)
        self._expected = schedule.microbatches
        self._added.clear()
        row = schedule.rows[self.mesh["pp"].index]
        last = {action.stage: at for at, action in enumerate(row) if action.kind in ("B", "W")}
        untied = [pending for pending in self._pending if not self._is_tied(pending)]
        self._queue = deque(sorted(untied, key=lambda pending: last.get(pending.bucket.stage, 0)))
        for pending in self._pending:
            pending.missing, pending.started = len(pending.bucket.offsets), None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, nothing is reduced: main gradients stay sums over this rank's own micro-batches. A `finish` of every
        stage afterwards makes up for it."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def _on_added(self, parameter: LocalParameter) -> None:
        self._added[parameter] += 1
        expected = self._expected * parameter.uses
        if self._added[parameter] > expected:
            problem = "it is used more than once in a forward"
            raise RuntimeError(f"more gradients for {parameter.name} than micro-batches: {problem}")
        if self._added[parameter] < expected:
            return
        self._of[parameter].missing -= 1
        while not self._held and self._queue and self._queue[0].missing == 0:
            self._reduce(self._queue.popleft())

    def finish(self, stage: int) -> None:
        """Reduce what is left and wait for a stage's buckets: `owned` then holds their reduced gradients.

        Called for every stage once all computation of the step is done. With `check` raises UserError for a
        parameter that was not used in every micro-batch.
        """
        if self._held:
            self.buffers.context.weight_grads.clear_unused(self._of)
            return
        if self.check:
            self._refuse_missing()
        tied = [pending for pending in self._pending if self._is_tied(pending) and pending.started is None]
        for pending in [*self._queue, *sorted(tied, key=lambda pending: str(pending.bucket.tie))]:
            self._reduce(pending)
        self._queue.clear()
        for pending in self._pending:
            if pending.bucket.stage == stage and pending.started is not None:
                pending.started.wait()

    def _refuse_missing(self) -> None:
        names = [
            parameter.name
            for pending in self._pending
            if pending.missing
            for parameter in pending.bucket.offsets
            if self._added[parameter] < self._expected * parameter.uses
        ]
        if names:
            problem = f"some micro-batch did not use {', '.join(names)}"
            raise UserError(f"parallel.check_gradients=true: {problem}; use them in every forward, or set it to false")

    def _reduce(self, pending: _Pending) -> None:
        bucket = pending.bucket
        self.buffers.context.weight_grads.clear_unused(bucket.offsets)
        for axis, views in pending.partial:
            _sum_together(views, axis)
        if (holders := self._holders(pending)) is not None:
            all_reduce(bucket.grads, holders)
        if pending.left_over is not None:
            bucket.grads.add_(pending.left_over)
        pending.started = _DONE
        if pending.reduction is not None:
            name = f"gradient reduction of bucket {pending.number}"
            pending.started = pending.reduction.start(name, bucket.grads, pending.into)

    def _is_tied(self, pending: _Pending) -> bool:
        """Whether other ranks' stages hold a copy, whose gradient is part of the sum."""
        return self._holders(pending) is not None

    def _holders(self, pending: _Pending) -> Axis | None:
        return self.buffers.context.holders(next(iter(pending.bucket.offsets)))

    def keep_if(self, finite: Tensor) -> None:
        """finite: bool [1] on the device, the same on all ranks. If not, nothing of this step's gradients comes back in
        later sums. Nothing waits for its value."""
        for pending in self._pending:
            if pending.reduction is not None:
                pending.reduction.keep_if(finite)
            if pending.left_over is not None and bool(finite):  # waits, in the first step behind a load
                pending.left_over = None

    def sizes(self) -> list[dict[str, int]]:
        """Elements of what a step leaves to the next one, by kind (see `Reduction`), for every bucket."""
        found = [pending.reduction for pending in self._pending]
        return [{} if one is None else one.sizes(self.buffers.zero) for one in found]

    def carried(self) -> list[dict[str, Tensor]]:
        """What the last step has left to the next one, by kind, for every bucket; empty where that is nothing."""
        found = []
        for pending in self._pending:
            kinds = {} if pending.reduction is None else pending.reduction.carried()
            if pending.left_over is not None:
                error = kinds.get("summand_error", 0.0)
                kinds["summand_error"] = pending.left_over + error
            found.append(kinds)
        return found

    def resume(self, carried: Sequence[Mapping[str, Tensor]]) -> None:
        """Begin with what `carried` gave in a run of the same layout."""
        for pending, kinds in zip(self._pending, carried, strict=True):
            if pending.reduction is not None and kinds:
                pending.reduction.resume(kinds)

    def leave_over(self, gradients: Sequence[Tensor]) -> None:
        """Add these, [size] for every bucket, to this rank's gradients of the next step that is not skipped."""
        for pending, gradient in zip(self._pending, gradients, strict=True):
            pending.left_over = gradient

    @property
    def leaves_over(self) -> bool:
        return any(pending.left_over is not None for pending in self._pending)

    @property
    def sent(self) -> int:
        """Bytes of gradients that this rank has sent to its data-parallel peers so far."""
        return sum(pending.reduction.sent for pending in self._pending if pending.reduction is not None)

    def _sum_axes(self, piece: Piece) -> list[Axis]:
        """The ranks that hold this piece too and whose gradients of it are parts of a sum.

        Copies of a block saw different heads; a parameter that tp does not divide saw different heads, or different
        tokens under sequence parallelism.
        """
        axes = []
        for name, copies in piece.shard.copies.items():
            context, record = self.buffers.context, piece.record
            differs = {"local": context.splits_tokens, "heads": True, "all": False}[record.sees]
            if copies.count > 1 and (record.split(name) is not None or (name == context.tp.name and differs)):
                axes.append(self.mesh.part_of(name, copies.count))
        return axes

    def _partial_sums(self, bucket: Bucket) -> list[tuple[Axis, list[Tensor]]]:
        sums: dict[tuple[int, ...], tuple[Axis, list[Tensor]]] = {}
        for parameter in bucket.offsets:
            for piece in parameter.pieces:
                for axis in self._sum_axes(piece):
                    sums.setdefault(axis.ranks, (axis, []))[1].append(parameter.grad[piece.start : piece.stop])
        return list(sums.values())


class _Done:
    def wait(self) -> None:
        pass


_DONE = _Done()


def _sum_together(views: list[Tensor], axis: Axis) -> None:
    """Sum several small gradients over an axis in one all-reduce."""
    together = all_reduce(torch.cat([view.reshape(-1) for view in views]), axis)
    position = 0
    for view in views:
        view.copy_(together[position : position + view.numel()].view(view.shape))
        position += view.numel()
