"""Boxes of logical tensors, and which of them a rank owns."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from torch import Tensor

from megapar.parallel.buffers import StageBuffers
from megapar.parallel.record import ParameterRecord


@dataclass(frozen=True)
class Box:
    """A block of a tensor: elements offset[d] to offset[d] + shape[d] along every dim d."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether it is a box of a tensor of this shape."""
        return len(self.offset) == len(self.shape) == len(shape) and all(
            start >= 0 and length > 0 and start + length <= whole
            for start, length, whole in zip(self.offset, self.shape, shape, strict=True)
        )

    def overlap(self, other: "Box") -> "Box | None":
        """What two boxes of one tensor have in common."""
        offset, shape = [], []
        for a, n, b, m in zip(self.offset, self.shape, other.offset, other.shape, strict=True):
            start, stop = max(a, b), min(a + n, b + m)
            if start >= stop:
                return None
            offset.append(start)
            shape.append(stop - start)
        return Box(tuple(offset), tuple(shape))

    def within(self, outer: "Box") -> tuple[slice, ...]:
        """The index of this box in a tensor that holds the outer one."""
        return tuple(
            slice(start - base, start - base + length)
            for start, length, base in zip(self.offset, self.shape, outer.offset, strict=True)
        )


def boxes_of_run(start: int, stop: int, shape: tuple[int, ...]) -> list[Box]:
    """Elements start..stop of a tensor in row-major order as boxes, in that order: at most 2 * dims - 1.

    (3, 9) of shape (3, 4) is the end of row 0, the whole row 1 and the beginning of row 2.
    """
    if start >= stop:
        return []
    if len(shape) == 1:
        return [Box((start,), (stop - start,))]
    inner = shape[1:]
    (first, head), (last, tail) = divmod(start, prod(inner)), divmod(stop, prod(inner))
    if first == last:
        return [_in_row(first, box) for box in boxes_of_run(head, tail, inner)]
    boxes = []
    if head:
        boxes += [_in_row(first, box) for box in boxes_of_run(head, prod(inner), inner)]
        first += 1
    if first < last:
        boxes.append(Box((first, *[0] * len(inner)), (last - first, *inner)))
    return boxes + [_in_row(last, box) for box in boxes_of_run(0, tail, inner)]


def _in_row(row: int, box: Box) -> Box:
    return Box((row, *box.offset), (1, *box.shape))


@dataclass(frozen=True)
class OwnedBox:
    """A box of a logical parameter whose values stand at `run` in a flat tensor of what this rank owns.

    counted: of the model-parallel ranks that hold it, this one counts it (see `StageBuffers.counted`).
    """

    record: ParameterRecord
    box: Box
    run: slice
    counted: bool

    def view(self, flat: Tensor) -> Tensor:
        """Its values, [box.shape], in a flat tensor [owned]."""
        return flat[self.run].view(self.box.shape)


def owned_boxes(buffers: StageBuffers) -> Iterator[OwnedBox]:
    """Everything that this rank owns. With ZeRO-1 the owned runs end in the middle of a row: hence boxes."""
    parts = buffers.owned_parts()
    for parameter, piece, start, stop in buffers.pieces():
        record, shard = piece.record, piece.shard
        corner = [place.start for place in record.box(shard)]
        counted = buffers.counted(parameter, piece)
        for part, position in parts:
            first, last = max(start, part.start), min(stop, part.stop)
            place = position + first - part.start
            for box in boxes_of_run(first - start, last - start, record.shard_shape(shard)):
                offset = tuple(a + b for a, b in zip(corner, box.offset, strict=True))
                yield OwnedBox(record, Box(offset, box.shape), slice(place, place + box.numel), counted)
                place += box.numel
