"""The parameter record: one declaration from which everything else about a parameter follows.

From a record follow the initial values (any rank makes its own shard), the axes its gradient is summed over, its share
in the gradient norm, whether weight decay applies, and its coordinates in a checkpoint. Nothing is kept as attributes
on tensors, and no code matches on parameter names.
"""

import hashlib
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor


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
class Shard:
    """The part of a logical parameter that one tensor-parallel rank holds: [start, stop) along the split dim."""

    start: int
    stop: int
    replicas: int = 1  # ranks that hold this very part
    replica: int = 0  # which of them this rank is


@dataclass(frozen=True)
class ParameterRecord:
    """Declaration of one logical (unsharded) parameter.

    name: unique in the model, the same in every layout.
    shape: logical shape.
    split_dim: the dim split over tp, or None where every rank holds the whole.
    blocks: number of indivisible blocks along split_dim (heads); None: single elements. Where there are fewer blocks
        than ranks, neighbouring ranks hold replicas of a block.
    tie: name of the group of stages that hold a copy of it (tied embeddings), or None.
    """

    name: str
    shape: tuple[int, ...]
    init: Init
    split_dim: int | None = None
    blocks: int | None = None
    tie: str | None = None

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def decays(self) -> bool:
        """Weight decay applies to matrices, not to norms and biases."""
        return len(self.shape) >= 2

    def shard(self, ranks: int, rank: int) -> Shard:
        """What rank `rank` of `ranks` tensor-parallel ranks holds. Uneven shards differ by one block."""
        if self.split_dim is None:
            return Shard(0, self.shape[0], replicas=ranks, replica=rank)
        length = self.shape[self.split_dim]
        blocks = self.blocks or length
        if blocks < ranks:
            assert ranks % blocks == 0, f"{self.name}: {blocks} blocks over {ranks} ranks"
            replicas = ranks // blocks
            block = length // blocks
            return Shard(rank // replicas * block, (rank // replicas + 1) * block, replicas, rank % replicas)
        first, last = rank * blocks // ranks, (rank + 1) * blocks // ranks
        return Shard(first * length // blocks, last * length // blocks)

    def widest_shard(self, ranks: int) -> int:
        """Elements of the largest shard: the same number on every rank, unlike a shard's own where they are uneven."""
        return max(prod(self.shard_shape(self.shard(ranks, rank))) for rank in range(ranks))

    def shard_shape(self, shard: Shard) -> tuple[int, ...]:
        shape = list(self.shape)
        shape[self.split_dim or 0] = shard.stop - shard.start
        return tuple(shape)

    def box(self, shard: Shard) -> tuple[slice, ...]:
        """The shard's place in the logical tensor."""
        place = [slice(0, length) for length in self.shape]
        place[self.split_dim or 0] = slice(shard.start, shard.stop)
        return tuple(place)


_CHUNK = 1 << 18


def normal_values(seed: int, name: str, start: int, stop: int) -> np.ndarray:
    """Standard normal values number `start` to `stop` of the stream (seed, name), float64.

    Counter-based (Salmon et al. 2011, Philox): value i costs the same wherever the range begins. One 64-bit word makes
    one value (Box-Muller on its halves), so position and word count stay equal, unlike numpy's ziggurat.
    """
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()
    generator = np.random.Philox(key=int.from_bytes(digest, "little"))
    generator.advance(start // 4)  # four words per counter value
    words = generator.random_raw(stop - start // 4 * 4)[start % 4 :]
    radius = np.sqrt(-2.0 * np.log(((words >> np.uint64(32)) + 1.0) * 2.0**-32))
    return radius * np.cos((words & np.uint64(0xFFFFFFFF)) * (2.0 * np.pi * 2.0**-32))


def fill(record: ParameterRecord, shard: Shard, seed: int, out: Tensor) -> None:
    """Write a shard's initial values into `out` [shard shape], any dtype and device.

    Value number i belongs to element i of the logical tensor with the split dim moved to the front. The split dim is a
    property of the record and not of the layout, so every shard is one run of that order, made without the rest, and
    the union over any number of ranks is bit for bit the one-process tensor. Memory: a few MiB, at least one row.
    """
    match record.init:
        case Constant(value):
            out.fill_(value)
        case Normal(std):
            dim = record.split_dim or 0
            moved = out.movedim(dim, 0)
            row = record.numel // record.shape[dim]
            rows = max(1, _CHUNK // row)
            for first in range(shard.start, shard.stop, rows):
                last = min(shard.stop, first + rows)
                values = normal_values(seed, record.name, first * row, last * row) * std
                part = moved[first - shard.start : last - shard.start]
                part.copy_(torch.from_numpy(values).view(part.shape))
        case Given():
            raise AssertionError(f"{record.name} comes with its values")
