"""Whole matrices for updates that look at one as a whole, though ranks own parts of it.

A logical matrix may be split over tensor-parallel ranks, evenly or not, and over ZeRO-1's slices, and ranks may hold
copies. Each is assigned to one rank of those that hold its stage, which gets its parts, works on the whole, and gives
every owner of a part the new one: two all-to-alls a step for all matrices together, and no matrix is worked on twice.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from megapar.parallel.agreement import gather_texts
from megapar.parallel.boxes import Box, OwnedBox, owned_boxes
from megapar.parallel.buffers import Held, StageBuffers
from megapar.parallel.collectives import all_to_all

Chosen = Callable[[Held], bool]
_Views = Sequence[Sequence[Tensor]]  # by rank


def assigned(shapes: Mapping[str, Sequence[int]], ranks: int) -> dict[str, int]:
    """Which of `ranks` ranks each matrix goes to: the heaviest first, each to the one that has least to do.

    By the products of Newton-Schulz: the longer side times the square of the shorter one.
    """
    work = {name: max(shape) * min(shape) ** 2 for name, shape in shapes.items()}
    load, found = [0] * ranks, {}
    for name in sorted(work, key=lambda name: (-work[name], name)):
        found[name] = load.index(min(load))
        load[found[name]] += work[name]
    return found


@dataclass(frozen=True)
class _Part:
    """A box of a matrix that a rank owns. sent: it gives it to the rank that the matrix is assigned to."""

    name: str
    box: Box
    sent: bool


class WholeMatrices:
    """The matrices of a rank's stages that are chosen. Collective over the ranks of the stage: all make one alike.

    chosen: of what this rank holds; a choice by the parameter alone, and so the same on all ranks
    """

    def __init__(self, buffers: StageBuffers, chosen: Chosen) -> None:
        self.axis = buffers.mesh.stage
        self.nothing = torch.empty(0, dtype=buffers.context.wide_dtype, device=buffers.context.device)
        self.shapes = _shapes(buffers, chosen)
        self.at = assigned(self.shapes, self.axis.size)
        self.mine: list[list[OwnedBox]] = [[] for _ in self.axis.ranks]  # by the rank that the matrix is assigned to
        for box in owned_boxes(buffers, chosen):
            self.mine[self.at[box.record.name]].append(box)
        self.sent = [[box for box in boxes if _sends(buffers, box, to)] for to, boxes in enumerate(self.mine)]
        described = [
            [box.record.name, box.box.offset, box.box.shape, _sends(buffers, box, to)]
            for to, boxes in enumerate(self.mine)
            for box in boxes
        ]
        everyones = [
            [_Part(name, Box(tuple(offset), tuple(shape)), sent) for name, offset, shape, sent in json.loads(text)]
            for text in gather_texts(json.dumps(described), self.axis, buffers.mesh.device)
        ]
        # What this rank works on, by the rank that owns the part, in the order in which that one lists them.
        self.theirs = [[part for part in parts if self.at[part.name] == self.axis.index] for parts in everyones]

    def each(self, owned: Sequence[Tensor], function: Callable[[Tensor], Tensor]) -> None:
        """function: a matrix [rows, columns] -> the same shape. owned: of every bucket, where matrices stand and their
        new values go. Collective."""
        mine = [name for name, index in self.at.items() if index == self.axis.index]
        whole = {name: owned[0].new_empty(self.shapes[name]) for name in mine}
        self._exchange(
            [[box.view(owned) for box in boxes] for boxes in self.sent],
            [[_view(whole[part.name], part.box) for part in parts if part.sent] for parts in self.theirs],
        )
        whole = {name: function(matrix) for name, matrix in whole.items()}
        self._exchange(
            [[_view(whole[part.name], part.box) for part in parts] for parts in self.theirs],
            [[box.view(owned) for box in boxes] for boxes in self.mine],
        )

    def _exchange(self, given: _Views, taken: _Views) -> None:
        """Give every rank the values of its views, and write what comes from it to its views of `taken`."""
        flat = torch.cat([self.nothing, *(view.reshape(-1) for views in given for view in views)])
        into = [view for views in taken for view in views]
        arrived = all_to_all(flat, _sizes(given), _sizes(taken), self.axis)
        for view, values in zip(into, arrived.split([view.numel() for view in into]), strict=True):
            view.copy_(values.view(view.shape))


def operands(buffers: StageBuffers, chosen: Chosen) -> tuple[int, int]:
    """Elements that this rank gives to the two all-to-alls of `WholeMatrices.each`. Nothing is communicated."""
    mesh = buffers.mesh
    at = assigned(_shapes(buffers, chosen), mesh.stage.size)
    first = sum(box.box.numel for box in owned_boxes(buffers, chosen) if _sends(buffers, box, at[box.record.name]))
    places = [mesh.layout.coordinates(rank) for rank in mesh.stage.ranks]
    records = [
        held.piece.record for held in filter(chosen, buffers.held()) if at[held.piece.record.name] == mesh.stage.index
    ]
    held_by_all = sum(prod(record.shard(mesh.layout, place).shape) for record in records for place in places)
    return first, held_by_all // (mesh.data.size if buffers.zero else 1)


def _shapes(buffers: StageBuffers, chosen: Chosen) -> dict[str, tuple[int, ...]]:
    """Of the chosen matrices, by name."""
    return {held.piece.record.name: held.piece.record.shape for held in filter(chosen, buffers.held())}


def _sends(buffers: StageBuffers, box: OwnedBox, to: int) -> bool:
    """Whether this rank gives the box to that one of its stage, which gets each element once: of tensor-parallel copies
    from the first, and without ZeRO-1, where every replica owns all, from its own replica."""
    mesh = buffers.mesh
    replicas = [mesh.layout.replica(mesh.layout.coordinates(rank)) for rank in (mesh.rank, mesh.stage.ranks[to])]
    return box.held.piece.shard.counted and (buffers.zero or replicas[0] == replicas[1])


def _sizes(views: _Views) -> list[int]:
    """Elements, by rank."""
    return [sum(view.numel() for view in of_rank) for of_rank in views]


def _view(matrix: Tensor, box: Box) -> Tensor:
    """A box of a whole matrix."""
    return matrix[tuple(slice(first, first + length) for first, length in zip(box.offset, box.shape, strict=True))]
