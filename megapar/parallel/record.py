"""The parameter record: one declaration from which everything else about a parameter follows.

From a record follow the initial values (any rank makes its own shard), the axes its gradient is summed over, its share
in the gradient norm, whether weight decay applies, and its coordinates in a checkpoint. Nothing is kept as attributes
on tensors, and no code matches on parameter names.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

from megapar.config.layout import AXES, Layout


@dataclass(frozen=True)
class Normal:
    """Independent normal values with mean 0 and the given standard deviation."""

    std: float


@dataclass(frozen=True)
class Constant:
    """One value everywhere."""

    value: float


@dataclass(frozen=True)
class Given:
    """The values that a plain module was built with."""


Init = Normal | Constant | Given


@dataclass(frozen=True)
class Split:
    """An axis of the mesh whose ranks divide a parameter along `dim`.

    blocks: number of indivisible blocks along the dim (heads); None: single elements. Uneven parts differ by one block.
    Where there are fewer blocks than ranks, neighbouring ranks hold copies of a block, and their gradients of it are
    parts of a sum.
    """

    axis: str
    dim: int
    blocks: int | None = None

    def part(self, length: int, ranks: int, rank: int) -> "tuple[slice, Copies]":
        """What rank `rank` of `ranks` holds of a dim of this length."""
        blocks = self.blocks or length
        if blocks < ranks:
            assert ranks % blocks == 0, f"{blocks} blocks over {ranks} ranks"
            copies, block = ranks // blocks, length // blocks
            place = rank // copies
            return slice(place * block, (place + 1) * block), Copies(copies, rank % copies)
        first, last = rank * blocks // ranks, (rank + 1) * blocks // ranks
        return slice(first * length // blocks, last * length // blocks), Copies()


@dataclass(frozen=True)
class Copies:
    """How many neighbouring ranks along an axis hold the same, and which of them this one is."""

    count: int = 1
    index: int = 0


@dataclass(frozen=True)
class Shard:
    """What one rank holds of a logical parameter.

    box: elements [start, stop) along every dim
    copies: by axis, for those axes that could have divided it
    """

    box: tuple[slice, ...]
    copies: dict[str, Copies]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(place.stop - place.start for place in self.box)

    @property
    def unique(self) -> bool:
        """Whether no other rank of the same stage and replica holds it too."""
        return all(copies.count == 1 for copies in self.copies.values())

    @property
    def counted(self) -> bool:
        """Whether this rank counts it in sums over the model: of those that hold the same exactly one does."""
        return all(copies.index == 0 for copies in self.copies.values())


@dataclass(frozen=True)
class ParameterRecord:
    """Declaration of one logical (unsharded) parameter.

    name: unique in the model, the same in every layout.
    shape: logical shape.
    splits: the axes that divide it; on the ranks of other axes it is whole.
    sees: what an op that reads it on every tensor-parallel rank sees there, if they do not divide it: `local`, this
        rank's tokens outside the tensor-parallel regions; `heads`, those of this rank; `all`, the same on every rank.
        Gradients are parts of a sum where ranks see different things.
    adapter: trained also where the rest of the model is frozen.
    table: its rows are looked up; no layer multiplies by it as a matrix.
    tie: name of the group of stages that hold a copy of it (tied embeddings), or None.
    """

    name: str
    shape: tuple[int, ...]
    init: Init
    splits: tuple[Split, ...] = ()
    tie: str | None = None
    sees: Literal["local", "heads", "all"] = "local"
    adapter: bool = False
    table: bool = False

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def decays(self) -> bool:
        """Weight decay applies to matrices, not to norms and biases."""
        return len(self.shape) >= 2

    def split(self, axis: str) -> Split | None:
        """How an axis divides it."""
        return next((split for split in self.splits if split.axis == axis), None)

    def shard(self, layout: Layout, place: Mapping[str, int]) -> Shard:
        """What the rank with these coordinates holds."""
        box = [slice(0, length) for length in self.shape]
        copies = {name: Copies(layout[name], place[name]) for name, kind in AXES.items() if kind.splits == "weights"}
        for split in self.splits:
            box[split.dim], copies[split.axis] = split.part(
                self.shape[split.dim], layout[split.axis], place[split.axis]
            )
        return Shard(tuple(box), copies)

    def widest(self, layout: Layout) -> int:
        """Elements of the largest shard: the same number on every rank, unlike a shard's own where they are uneven."""
        shape = list(self.shape)
        for split in self.splits:
            parts = [split.part(shape[split.dim], layout[split.axis], rank)[0] for rank in range(layout[split.axis])]
            shape[split.dim] = max(part.stop - part.start for part in parts)
        return prod(shape)
