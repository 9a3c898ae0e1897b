"""Boxes of logical tensors, and which of them a rank owns."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

from torch import Tensor

from megapar.parallel.buffers import Held, StageBuffers
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

    def pieces(self, most: int = 1 << 20) -> "Iterator[Box]":
        """The box in blocks of whole rows, of at most `most` elements or of one row."""
        rows = max(1, most // max(1, prod(self.shape[1:])))
        for start in range(0, self.shape[0], rows):
            length = min(rows, self.shape[0] - start)
            yield Box((self.offset[0] + start, *self.offset[1:]), (length, *self.shape[1:]))

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


class PerBucket(Protocol):
    """What there is for the elements that are owned of a bucket: a tensor, or one for some of them alone."""

    def __getitem__(self, run: slice, /) -> Tensor | None: ...


@dataclass(frozen=True)
class OwnedBox:
    """A box of a logical parameter whose values stand at `run` in what this rank owns of a bucket."""

    held: Held
    box: Box
    bucket: int
    run: slice

    @property
    def record(self) -> ParameterRecord:
        return self.held.piece.record

    @property
    def counted(self) -> bool:
        """Whether of the model-parallel ranks that hold it this one counts it."""
        return self.held.counted

    def view(self, owned: Sequence[Tensor]) -> Tensor:
        """Its values, [box.shape], where every bucket has a tensor of what is owned."""
        return owned[self.bucket][self.run].view(self.box.shape)

    def part_of(self, state: Sequence[PerBucket]) -> Tensor | None:
        """The same of state that not every parameter has; None where this one has none."""
        values = state[self.bucket][self.run]
        return None if values is None else values.view(self.box.shape)


def owned_boxes(buffers: StageBuffers, chosen: Callable[[Held], bool] = lambda held: True) -> Iterator[OwnedBox]:
    """All that this rank owns of what is chosen. With ZeRO-1 the owned runs end in the middle of a row: hence boxes."""
    for held in filter(chosen, buffers.held()):
        yield from boxes_within(held, buffers.buckets[held.bucket].owned)


def boxes_within(held: Held, part: slice) -> Iterator[OwnedBox]:
    """What of a held piece is in a part of its bucket; runs count from that part's beginning."""
    start, shard = held.run.start, held.piece.shard
    first, last = max(start, part.start), min(held.run.stop, part.stop)
    place = first - part.start
    for box in boxes_of_run(first - start, last - start, shard.shape):
        offset = tuple(whole.start + inner for whole, inner in zip(shard.box, box.offset, strict=True))
        run = slice(place, place + box.numel)
        yield OwnedBox(held, Box(offset, box.shape), held.bucket, run)
        place += box.numel
