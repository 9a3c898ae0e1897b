"""Gradient reduction: which sums a main gradient still needs, and when each can start.

A main gradient holds the sum over this rank's micro-batches. Three more sums follow from the records:
1. over tp, where ranks saw different tokens or heads: parameters that every rank holds, under sequence parallelism; and
   the replicas of a kv head;
2. over the two ends of the pipeline, for tied embeddings;
3. over dp, bucket by bucket, started while the rest of the last backward still runs.
With ZeRO-1 the third is a reduce-scatter, and each rank is left with the slice whose optimizer state it owns.
"""

from collections import Counter

import torch
from torch import Tensor

from megapar.mesh import Axis
from megapar.parallel.buffers import Bucket, StageBuffers
from megapar.parallel.collectives import all_reduce
from megapar.parallel.compression import Matrix, Waiting, reduction
from megapar.parallel.weight_grad import LocalParameter, Piece


class GradSync:
    """Reduces the main gradients of a rank's stages, once per step."""

    def __init__(self, buffers: StageBuffers, compression: str = "none", powersgd_rank: int = 4) -> None:
        self.buffers = buffers
        self.mesh = buffers.mesh
        self._bucket_of = {parameter: bucket for bucket in buffers.buckets for parameter in bucket.parameters}
        self._partial = {id(bucket): self._partial_sums(bucket) for bucket in buffers.buckets}
        self._expected = 0
        self._added: Counter[LocalParameter] = Counter()
        self._missing: dict[int, int] = {}
        self._started: list[tuple[Waiting, Bucket]] = []
        self._reductions = {
            id(bucket): reduction(
                compression, self.mesh.data, self._matrices(bucket), bucket.stop - bucket.start, powersgd_rank
            )
            for bucket in (buffers.buckets if self.mesh.data.size > 1 else ())
        }
        # What this rank owns after the reduction: with ZeRO-1 a buffer of its own, else all main gradients.
        self.owned = buffers.take_owned(buffers.grads)
        self._owned_part = {
            id(bucket): self.owned[position : position + part.stop - part.start]
            for bucket, (part, position) in zip(buffers.buckets, buffers.owned_parts(), strict=True)
        }
        buffers.context.weight_grads.on_added = self._on_added
        # The groups of kv-head replicas are collective to make: make them now.
        for piece in (piece for parameter in self._bucket_of for piece in parameter.pieces):
            self._sum_axis(piece)

    def start(self, microbatches: int) -> None:
        """Begin a step: zero the main gradients; every use of a parameter adds once per micro-batch."""
        self.buffers.grads.zero_()
        self._expected = microbatches
        self._added.clear()
        self._missing = {id(bucket): len(bucket.parameters) for bucket in self.buffers.buckets}

    def _on_added(self, parameter: LocalParameter) -> None:
        self._added[parameter] += 1
        if self._added[parameter] < self._expected * parameter.uses:
            return
        bucket = self._bucket_of[parameter]
        self._missing[id(bucket)] -= 1
        if self._missing[id(bucket)] == 0 and not self._waits_for_other_end(bucket):
            self._reduce(bucket)

    def finish(self, stage: int) -> None:
        """Reduce what is left of a stage and wait. `owned` then holds the reduced gradients of it this rank owns."""
        for bucket in (bucket for bucket in self.buffers.buckets if bucket.stage == stage):
            missing = self._missing[id(bucket)]
            if missing:
                names = [p.name for p in bucket.parameters if self._added[p] < self._expected * p.uses]
                raise RuntimeError(
                    f"no complete gradient for {', '.join(names)}: is the parameter used in every forward?"
                )
            if self._waits_for_other_end(bucket):
                self._reduce(bucket)
        for started in [started for started, bucket in self._started if bucket.stage == stage]:
            started.wait()
        self._started = [(started, bucket) for started, bucket in self._started if bucket.stage != stage]

    def _reduce(self, bucket: Bucket) -> None:
        for axis, views in self._partial[id(bucket)]:
            _sum_together(views, axis)
        if self._waits_for_other_end(bucket):
            assert self.buffers.context.ends is not None
            all_reduce(self.buffers.grads[bucket.start : bucket.stop], self.buffers.context.ends)
        if self.mesh.data.size == 1:
            return
        flat = self.buffers.grads[bucket.start : bucket.stop]
        name = f"gradient reduction of bucket {self.buffers.buckets.index(bucket)}"
        into = self._owned_part[id(bucket)] if self.buffers.zero else flat
        self._started.append((self._reductions[id(bucket)].start(name, flat, into), bucket))

    def forget(self) -> None:
        """Let nothing of the gradients so far, which are not finite, come back in later sums. On all ranks alike."""
        for one in self._reductions.values():
            one.forget()

    def _waits_for_other_end(self, bucket: Bucket) -> bool:
        return any(self.buffers.waits_for_other_end(parameter) for parameter in bucket.parameters)

    @property
    def sent(self) -> int:
        """Bytes of gradients that this rank has sent to its data-parallel peers so far."""
        return sum(one.sent for one in self._reductions.values())

    def _matrices(self, bucket: Bucket) -> list[Matrix]:
        """What may be compressed: matrices that no tensor-parallel peer holds too."""
        found = []
        for parameter in bucket.parameters:
            for piece in parameter.pieces:
                shape = piece.record.shard_shape(piece.shard)
                if len(shape) > 1 and piece.shard.replicas == 1:
                    columns = torch.Size(shape[1:]).numel()
                    start = self.buffers.offsets[parameter] - bucket.start + piece.start * columns
                    found.append(Matrix(start, shape[0], columns))
        return found

    def _sum_axis(self, piece: Piece) -> Axis | None:
        """The ranks that hold this piece too and whose gradients of it are parts of a sum."""
        if piece.record.split_dim is None:
            return self.mesh["tp"] if self.buffers.context.splits_tokens else None
        return self.mesh.part_of("tp", piece.shard.replicas) if piece.shard.replicas > 1 else None

    def _partial_sums(self, bucket: Bucket) -> list[tuple[Axis, list[Tensor]]]:
        sums: dict[tuple[int, ...], tuple[Axis, list[Tensor]]] = {}
        for parameter in bucket.parameters:
            for piece in parameter.pieces:
                axis = self._sum_axis(piece)
                if axis is not None:
                    sums.setdefault(axis.ranks, (axis, []))[1].append(parameter.grad[piece.start : piece.stop])
        return list(sums.values())


def _sum_together(views: list[Tensor], axis: Axis) -> None:
    """Sum several small gradients over an axis in one all-reduce."""
    together = all_reduce(torch.cat([view.reshape(-1) for view in views]), axis)
    position = 0
    for view in views:
        view.copy_(together[position : position + view.numel()].view(view.shape))
        position += view.numel()
