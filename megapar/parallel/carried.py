"""What a step of compressed gradient reduction leaves to the next one, in logical coordinates.

| kind          | logical shape          | whose                                                   |
|---------------|------------------------|---------------------------------------------------------|
| summand_error | [replicas, *parameter] | of every replica, what it dropped of its own gradients  |
| sum_error     | parameter              | what the owners of its slices dropped of the sum        |
| factors       | [n], by bucket         | powersgd's Q, the same on all replicas                  |

In the layout that it comes from it is put back as it was, to the bit. In another one the errors are what has not
reached the weights yet: new replica r takes those of the former replicas r, r + R, r + 2 R, ... (R new ones), replica 0
those of the sum too, and adds them to its next gradient, whatever its method. Their sum over replicas stays. Factors
begin anew there.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megapar.parallel.boxes import Box, boxes_within
from megapar.parallel.buffers import Held
from megapar.parallel.grad_sync import GradSync

ERRORS = ("summand_error", "sum_error")
Stored = Mapping[str, Mapping[str, tuple[tuple[int, ...], Collection[Box]]]]  # (shape, boxes) by kind and name
ReadBox = Callable[[str, str, Box, Tensor], None]  # (kind, name, box, out [box.shape])


@dataclass(frozen=True)
class CarriedBox:
    """A box of what is carried; its values are at `run` of the bucket's. counted: one of those that hold it."""

    kind: str
    name: str
    shape: tuple[int, ...]
    box: Box
    bucket: int
    run: slice
    counted: bool


def carried_boxes(sync: GradSync, sizes: list[dict[str, int]]) -> Iterator[CarriedBox]:
    """What of every kind this rank holds; sizes: elements by kind, for every bucket."""
    buckets = sync.buffers.buckets
    for held in sync.buffers.held():
        axis, kinds = buckets[held.bucket].axis, sizes[held.bucket]
        if "summand_error" in kinds:
            for one in boxes_within(held, slice(0, buckets[held.bucket].size)):
                box = _of_replica(axis.index, one.box)
                yield _box("summand_error", held, (axis.size, *one.record.shape), box, one.run)
        if "sum_error" in kinds:
            start = axis.index * kinds["sum_error"]
            for one in boxes_within(held, slice(start, start + kinds["sum_error"])):
                yield _box("sum_error", held, one.record.shape, one.box, one.run)
    for number, (bucket, kinds) in enumerate(zip(buckets, sizes, strict=True)):
        if size := kinds.get("factors"):
            name, counted = _name_of_factors(sync, number)
            whole = Box((0,), (size,))
            yield CarriedBox(
                "factors", name, (size,), whole, number, slice(0, size), counted and bucket.axis.index == 0
            )


def _of_replica(replica: int, box: Box) -> Box:
    return Box((replica, *box.offset), (1, *box.shape))


def _box(kind: str, held: Held, shape: tuple[int, ...], box: Box, run: slice) -> CarriedBox:
    return CarriedBox(kind, held.piece.record.name, shape, box, held.bucket, run, held.counted)


def _name_of_factors(sync: GradSync, bucket: int) -> tuple[str, bool]:
    """By the bucket's first matrix, which no other rank of the replica holds but those of tied stages."""
    unique = (held for held in sync.buffers.held() if held.bucket == bucket and len(held.piece.shard.shape) > 1)
    first = next(held for held in unique if held.piece.shard.unique)
    offset = ".".join(str(place.start) for place in first.piece.shard.box)
    return f"{first.piece.record.name}@{offset}", first.counted


def fits(sync: GradSync, stored: Stored) -> bool:
    """Whether all that this rank holds was stored in the same boxes, and nothing else of its parameters."""
    sizes = sync.sizes()
    for one in carried_boxes(sync, sizes):
        shape, boxes = stored.get(one.kind, {}).get(one.name, ((), ()))
        if shape != one.shape or one.box not in boxes:
            return False
    return all(
        kind in sizes[held.bucket]
        for held in sync.buffers.held()
        for kind in ERRORS
        if held.piece.record.name in stored.get(kind, {})
    )


def put_back(sync: GradSync, read: ReadBox) -> None:
    """Begin with what was stored in this layout. Raises what `read` does."""
    sizes = sync.sizes()
    dtype, device = sync.buffers.context.wide_dtype, sync.buffers.context.device
    values = [{kind: torch.zeros(size, dtype=dtype, device=device) for kind, size in kinds.items()} for kinds in sizes]
    for one in carried_boxes(sync, sizes):
        read(one.kind, one.name, one.box, values[one.bucket][one.kind][one.run].view(one.box.shape))
    sync.resume(values)


def move(sync: GradSync, stored: Stored, read: ReadBox) -> None:
    """Add the errors of another layout to this rank's next gradient. Raises what `read` does."""
    summands, sums = stored.get("summand_error", {}), stored.get("sum_error", {})
    gradients = [torch.zeros_like(bucket.grads) for bucket in sync.buffers.buckets]
    for held in sync.buffers.held():
        bucket = sync.buffers.buckets[held.bucket]
        index, replicas = bucket.axis.index, bucket.axis.size
        for one in boxes_within(held, slice(0, bucket.size)):
            name, values = one.record.name, gradients[held.bucket][one.run].view(one.box.shape)
            if name in summands:
                for former in range(index, summands[name][0][0], replicas):
                    box = _of_replica(former, one.box)
                    read("summand_error", name, box, part := values.new_empty(box.shape))
                    values += part[0]
            if name in sums and index == 0:
                read("sum_error", name, one.box, part := torch.empty_like(values))
                values += part
    sync.leave_over(gradients)
