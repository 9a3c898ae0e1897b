"""The order of samples: a function of (seed, epoch, index) alone, whatever a sample is and wherever it is stored."""

import math
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

ROUNDS = 6
MASK64 = (1 << 64) - 1


def shuffled(position: int, count: int, seed: int, epoch: int) -> int:
    """Where `position` of an epoch goes: a permutation of 0..count-1 that depends on (seed, epoch) alone.

    A Feistel network on the grid of about sqrt(count) x sqrt(count) (Black and Rogaway 2002, "Ciphers with arbitrary
    finite domains"), walked on while it lands outside. It needs no table, so the order of a corpus of any size costs
    no memory, and unlike numpy's `permutation` it can't change with a library's version.
    """
    rows, columns = _grid(count)
    keys = _round_keys(seed, epoch)
    while True:
        row, column = divmod(position, columns)
        for turn in range(0, ROUNDS, 2):
            row = (row + _mix(column ^ keys[turn])) % rows
            column = (column + _mix(row ^ keys[turn + 1])) % columns
        position = row * columns + column
        if position < count:
            return position


@lru_cache(maxsize=64)
def _grid(count: int) -> tuple[int, int]:
    rows = max(1, math.isqrt(count - 1) + 1)
    return rows, -(-count // rows)


@lru_cache(maxsize=64)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    digest = blake2b(f"{seed} {epoch}".encode(), digest_size=8 * ROUNDS).digest()
    return tuple(int.from_bytes(digest[8 * turn : 8 * turn + 8], "little") for turn in range(ROUNDS))


def _mix(x: int) -> int:
    """The finaliser of splitmix64 on a Python int."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


@dataclass(frozen=True)
class SampleOrder:
    """Which of `count` items a sample is.

    Samples are counted from 0 over all epochs. shuffle: every epoch has an order of its own; else that of the items.
    """

    count: int
    seed: int
    shuffle: bool

    def item(self, index: int) -> int:
        """The item, 0 to count - 1, of sample `index`. Raises ValueError for a negative one."""
        if index < 0:
            raise ValueError(f"samples are counted from 0, got {index}")
        epoch, position = divmod(int(index), self.count)
        return shuffled(position, self.count, self.seed, epoch) if self.shuffle else position
