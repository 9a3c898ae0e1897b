"""Ranks announce each operation that others take part in before they begin it, and compare it with theirs.

An announcement is a record in the rank's slot of the board: over whom, the how many-th of these, what (name, shape,
dtype). When an operation is over, a rank reads what its peers have announced under the same number. Two that differ are
ranks that are out of step, which a library reports as a time-out, a crash, or not at all. No message is sent, and the
result is not yet used.
"""

import struct
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING

from megapar.trace.board import PAGE, Board, Memory

if TYPE_CHECKING:
    from torch import Tensor

_AT = 1024  # bytes of a slot, up to its end
_RECORD = struct.Struct("=QQ64s48s")  # key of over whom, number from 1, what, over whom
_WHAT = 64
_RECORDS = (PAGE - _AT) // _RECORD.size
_LOOKS, _PAUSE_S = 5, 0.002  # at a record that differs: it may be half written


class Desynchronised(RuntimeError):
    """Ranks take part in different operations."""


class Announcements:
    """Of one rank, whose slot of the board has its own number: all ranks are on this host."""

    def __init__(self, memory: Memory, rank: int) -> None:
        self.memory, self.rank = memory, rank
        self._numbers: dict[str, int] = defaultdict(int)
        self._next = 0

    @classmethod
    def on(cls, board: Board) -> "Announcements | None":
        return None if board.memory is None else cls(board.memory, board.slot)

    def announce(self, over: str, what: str) -> int:
        """Before an operation. Returns its number, the how many-th it is over the same ranks."""
        self._numbers[over] += 1
        number = self._numbers[over]
        at = self.rank * PAGE + _AT + self._next * _RECORD.size
        self._next = (self._next + 1) % _RECORDS
        _RECORD.pack_into(self.memory.map, at, _key(over), number, _cut(what), over.encode())
        return number

    def expect(self, over: str) -> int:
        """The number of the next operation over these ranks, of one that its peers alone announce."""
        self._numbers[over] += 1
        return self._numbers[over]

    def compare(self, over: str, number: int, what: str, ranks: Iterable[int]) -> None:
        """After an operation: raise Desynchronised where one of the ranks has announced another one under this number.

        One that has announced so many since that the record is gone has been compared by its other peers.
        """
        mine = _cut(what)
        for rank in ranks:
            if rank == self.rank:
                continue
            for _ in range(_LOOKS):
                theirs = self._find(rank, _key(over), number)
                if theirs is None or theirs == mine:
                    break
                time.sleep(_PAUSE_S)
            else:
                assert theirs is not None
                raise Desynchronised(_difference(over, number, {self.rank: mine, rank: theirs}))

    def _find(self, rank: int, key: int, number: int) -> bytes | None:
        for found, count, what, _ in _records(self.memory, rank):
            if found == key and count == number:
                return bytes(what.rstrip(b"\0"))
        return None


def out_of_step(memory: Memory, ranks: Iterable[int]) -> str | None:
    """What the first two ranks that have announced different operations under one number are out of step in; None if no
    ranks have. For the launcher, when a run has failed or is stuck."""
    seen: dict[tuple[int, int], tuple[int, bytes]] = {}
    for rank in ranks:
        for key, number, what, over in _records(memory, rank):
            other, theirs = seen.setdefault((key, number), (rank, what))
            if number and what != theirs:
                name = over.rstrip(b"\0").decode(errors="replace")
                return _difference(name, number, {other: theirs.rstrip(b"\0"), rank: what.rstrip(b"\0")})
    return None


def _records(memory: Memory, rank: int) -> Iterator[tuple[int, int, bytes, bytes]]:
    start = rank * PAGE + _AT
    for at in range(start, start + _RECORDS * _RECORD.size, _RECORD.size):
        yield _RECORD.unpack_from(memory.map, at)


def _difference(over: str, number: int, what: dict[int, bytes]) -> str:
    have = ", ".join(f"rank {rank} has {text.decode(errors='replace')}" for rank, text in what.items())
    return f"ranks are out of step in operation {number} over {over}: {have}"


def described(operation: str, *operands: "Tensor") -> str:
    """An operation with the shapes and dtypes of what it works on."""
    return " ".join([operation, *(f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in operands)])


@lru_cache(1024)
def _cut(what: str) -> bytes:
    """As much as a record holds; of a longer text its beginning and a checksum of it all."""
    text = what.encode()
    return text if len(text) <= _WHAT else text[: _WHAT - 9] + b"~" + blake2b(text, digest_size=4).hexdigest().encode()


@lru_cache(1024)
def _key(over: str) -> int:
    return int.from_bytes(blake2b(over.encode(), digest_size=8).digest(), "little")
