"""Memory that every rank of a group can write to, and the protocol of its use.

A channel is what one operation uses: a segment of memory on every rank, all alike, with two halves of flags and data.
Every use of it is an epoch, counted from 1 by every rank for itself; epoch e uses half e % 2. Ranks push: they write to
their peers' segments and read only their own. Three rules make a use safe, whatever the ranks' speeds:

1. `begin`, the end-of-use handshake: a rank that begins epoch e tells its peers, and writes to none before all have
   begun e - 1. A peer that has begun e - 1 has done with e - 2, whose half is written now.
2. `post`: what a program has written to a peer, it announces by setting a flag there to e. In an epoch a flag has one
   writer; in the next use of its half, where a matrix of another shape has other tiles, it may be another one's.
3. `await_flag`: a program reads no data before their flag is e. A peer can be one epoch ahead, and then writes to the
   other half, flags and all; it can't be two ahead, because of rule 1.

What is written for e is e's mark: above 32 bits the epoch, below them a checksum of what the rank's call has to have in
common with its peers'. So data of a peer that calls with another shape are not read either, but an error.

A kernel that is the first to post in an epoch waits for nothing later than the epoch before, so ranks can't wait for
each other in a circle, in whichever order programs of a launch run. A wait that takes too long writes to an error word
who waited for whom, and ends, and nothing is announced any more. The host raises after the launch; on a GPU, where that
would be a synchronisation for every launch, before the optimizer's step.

The order of memory: everything that a program's threads wrote is before their barrier, and that is before the flag,
which is released at the scope of the system; a flag is read with acquire. (PTX ISA, "Memory Consistency Model".)
"""

import time
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megapar.kernels._common import INTERPRETED, device_function, target_arch, tl
from megapar.kernels.comm.segments import NoSharedMemory, PosixSegments, Segments, TorchSegments

OPERATIONS = ("all_reduce", "matmul_all_reduce", "matmul_reduce_scatter", "all_gather_matmul")
ALIGNMENT = 256  # bytes
FLAG_BYTES = 8
LEFT = (1 << 32) - 4096  # in place of a checksum: with the rank that has left, see `Channel.leave`
# How often a wait looks in a second, at the least: its limit is counted, not timed. compiled: a poll is a round trip to
# the second-level cache, about a microsecond (not measured). interpret: 100 us of interpretation, measured, and a nap.
POLLS_PER_S = {"compiled": 1_000_000, "interpret": 5_000}
NAP_S = 5e-5


class PeerTimeout(RuntimeError):
    """A rank waited in vain for another one's part of an operation."""


class PeersDiffer(ValueError):
    """Ranks called an operation with matrices that don't go together."""


# ------------------------------------------------------------------------------------------------------ for the kernels


def _sleep() -> None:
    """Ranks of an interpreted run share cores: let the one run that is waited for."""
    time.sleep(NAP_S)


def _nothing() -> None:
    pass


nap = _sleep if INTERPRETED else device_function(_nothing)


@device_function
def segment_of(table, peer, offset, DTYPE: tl.constexpr):
    """Address `offset` bytes, a multiple of 16, into a rank's segment. table [R]: where this process sees them all."""
    return tl.multiple_of((tl.load(table + peer) + offset).to(tl.pointer_type(DTYPE)), 16)


@device_function
def epoch_of(mark):
    return mark >> 32


@device_function
def await_epoch(flag, epoch, error, rank, peer, operation, limit):
    """A flag of the own segment, which `peer` writes, once its epoch is at least `epoch`; or what it is after `limit`
    polls, with an error. After an error every other wait is short."""
    limit, least = tl.where(tl.load(error) == 0, limit, 0), epoch << 32
    polls = limit * 0
    seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
    while (seen < least) & (polls < limit):
        nap()
        polls += 1
        seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
    if seen < least:
        report(error, 0, epoch, rank, peer, operation)
    return seen


@device_function
def await_flag(flag, mark, error, rank, peer, operation, limit):
    """Rule 3: return once a flag of the own segment, which `peer` writes, is `mark`, or with an error."""
    seen = await_epoch(flag, epoch_of(mark), error, rank, peer, operation, limit)
    if (epoch_of(seen) == epoch_of(mark)) & (seen != mark):
        report(error, 1, epoch_of(mark), rank, peer, operation)


@device_function
def report(error, differs, epoch, rank, peer, operation):
    """To the error word, unless it says something already: what `SymmetricMemory.check` raises."""
    word = ((epoch * 32 + operation * 2 + differs) * 4096 + peer) * 4096 + rank + 1
    tl.atomic_cas(error, tl.cast(0, tl.int64), word, sem="relaxed", scope="sys")


@device_function
def begin(table, begun, mark, error, rank, operation, limit, RANKS: tl.constexpr):
    """Rule 1. Every program of the kernel that writes to peers calls it first. begun [R]: of the own segment."""
    if tl.program_id(0) == 0:
        tell_begun(table, mark, rank, RANKS)
    await_begun(begun, epoch_of(mark) - 1, error, rank, operation, limit, RANKS)


@device_function
def tell_begun(table, mark, rank, RANKS: tl.constexpr):
    for peer in range(RANKS):
        tl.atomic_xchg(segment_of(table, peer, 0, tl.int64) + rank, mark, sem="release", scope="sys")


@device_function
def await_begun(begun, epoch, error, rank, operation, limit, RANKS: tl.constexpr):
    for peer in range(RANKS):
        await_epoch(begun + peer, epoch, error, rank, peer, operation, limit)


@device_function
def unless(error, number):
    """`number`; 0 after an error, when nothing is to be written to peers or announced any more."""
    return tl.where(tl.load(error) == 0, number, 0)


@device_function
def post(table, peer, flags_at, flag, mark):
    """Rule 2, after `tl.debug_barrier()`. flags_at: bytes from the segment's beginning to its flags."""
    tl.atomic_xchg(segment_of(table, peer, flags_at, tl.int64) + flag, mark, sem="release", scope="sys")


# --------------------------------------------------------------------------------------------------------- for the host


@dataclass
class Channel:
    """One operation's memory, with `num_flags` flags and `half` bytes of data in each half.

    In a segment: who has begun which epoch, the flags of both halves, the data of both.
    """

    segments: Segments
    ranks: int
    num_flags: int
    half: int
    epoch: int = 0
    in_use: bool = False

    @property
    def flags_at(self) -> int:
        """Where the flags of the current epoch's half begin."""
        return self.flags_of(self.epoch)

    def flags_of(self, epoch: int) -> int:
        """Where the flags of an epoch's half begin."""
        return aligned(self.ranks * FLAG_BYTES) + epoch % 2 * aligned(self.num_flags * FLAG_BYTES)

    def leave(self, rank: int) -> None:
        """Have every peer that waits in the next epoch see a mark that is not its own: this rank's call needs more
        memory than is here, and it will not come. Peers that need more, too, look at none of this any more."""
        at = self.flags_of(self.epoch + 1)
        for peer in range(self.ranks):
            flags = self.segments.of(peer)[at:][: self.num_flags * FLAG_BYTES].view(torch.int64)
            flags.fill_((self.epoch + 1) << 32 | LEFT + rank)

    def left(self, epoch: int) -> int | None:
        """The rank that has left an epoch, if one has."""
        flags = self.segments.own[self.flags_of(epoch) :][: self.num_flags * FLAG_BYTES].view(torch.int64)
        found = flags[flags >= epoch << 32 | LEFT]
        return int(found[0]) - (epoch << 32 | LEFT) if len(found) else None

    @property
    def data_at(self) -> int:
        """Where the data of the current epoch's half begin."""
        return self.size(self.ranks, self.num_flags, 0) + self.epoch % 2 * self.half

    @classmethod
    def size(cls, ranks: int, num_flags: int, half: int) -> int:
        """Bytes of its segment."""
        return aligned(ranks * FLAG_BYTES) + 2 * (aligned(num_flags * FLAG_BYTES) + half)


@dataclass(frozen=True)
class Use:
    """One epoch of a channel, as the kernels take it. memory: a `SymmetricMemory`."""

    memory: Any
    channel: Channel
    operation: str
    mark: int
    flags_at: int
    data_at: int

    def arguments(self) -> dict[str, Any]:
        """The first parameters of every kernel of `kernels/comm`."""
        memory = self.memory
        own = self.channel.segments.own
        return {
            "table": self.channel.segments.table,
            "begun": own[: memory.ranks * FLAG_BYTES].view(torch.int64),
            "flags": own[self.flags_at :][: self.channel.num_flags * FLAG_BYTES].view(torch.int64),
            "error": memory.error, "rank": memory.rank, "mark": self.mark,
            "operation": OPERATIONS.index(self.operation), "limit": memory.limit,
            "flags_at": self.flags_at, "RANKS": memory.ranks,
        }  # fmt: skip

    def finish(self) -> None:
        """What follows comes after this use. Raises PeerTimeout and PeersDiffer."""
        self.channel.in_use = False
        self.memory.join()
        self.memory.check()

    def own_data(self, dtype: torch.dtype, length: int, at: int = 0) -> Tensor:
        """`length` elements of this rank's half, from byte `at` on."""
        return self.channel.segments.own[self.data_at + at :][: length * dtype.itemsize].view(dtype)


@dataclass
class SymmetricMemory:
    """A group's channels, made as they are needed. All ranks use the same operations in the same order.

    timeout_s: after which a wait for a peer raises. Making or enlarging a channel is collective and happens before an
    operation; during one, torch.distributed has no part. Raises NoSharedMemory where devices differ.
    """

    group: dist.ProcessGroup
    device: torch.device
    timeout_s: float = 300.0
    channels: dict[str, Channel] = field(default_factory=dict)
    empty_calls: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.rank, self.ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.peers = dist.get_process_group_ranks(self.group)
        polls = POLLS_PER_S["interpret" if INTERPRETED else "compiled"]
        self.limit = min(max(1, int(self.timeout_s * polls)), (1 << 31) - 1)
        self.error = torch.zeros(1, dtype=torch.int64, device=self.device)
        # All ranks must cut a matrix into the same tiles: rank 0's machine says which.
        found: list[Any] = [(target_arch(), self._processors())]
        mine = found[0]
        dist.broadcast_object_list(found, src=self.peers[0], group=self.group)
        self.arch, self.processors = found[0]
        if mine[0] != self.arch:
            raise NoSharedMemory(
                f"parallel.tp_overlap=symmetric: rank {self.peers[self.rank]} runs on {mine[0]}, rank "
                f"{self.peers[0]} on {self.arch}; tensor-parallel ranks need equal devices"
            )
        # What waits on a product's processors is posted from here: its programs are to come before those that queue.
        self._side = torch.cuda.Stream(self.device, priority=-1) if self.device.type == "cuda" else None

    @property
    def has_aside(self) -> bool:
        """Whether launches can run beside others. If not, what waits is launched last."""
        return self._side is not None

    def _processors(self) -> int:
        from megapar.kernels.matmul import PROCESSORS

        if self.device.type == "cuda":
            return torch.cuda.get_device_properties(self.device).multi_processor_count
        return PROCESSORS[target_arch()]

    def use(self, operation: str, num_flags: int, half: int, call: str) -> Use:
        """Begin the next epoch of an operation that needs this many flags and bytes of data.

        call: what all ranks' calls have to have in common, as text.

        Collective where the operation never needed as much before; raises NoSharedMemory there. What is launched aside
        in this use comes after what was launched before it, and beside what is launched next. So what is written aside
        is allocated before: memory that is allocated later may be read by what was launched in between.
        """
        if self._side is not None:
            self._side.wait_stream(torch.cuda.current_stream(self.device))
        if self.empty_calls[operation]:
            call += f", after {self.empty_calls[operation]} empty ones"
        channel = self.channels.get(operation)
        if channel is not None and channel.in_use:
            raise RuntimeError(f"{operation}: finish one use before the next begins; its memory is in use")
        if channel is None or num_flags > channel.num_flags or half > channel.half:
            channel = self._make(operation, num_flags, half, call)
        channel.epoch += 1
        channel.in_use = True
        return Use(self, channel, operation, mark_of(channel.epoch, call), channel.flags_at, channel.data_at)

    def pass_over(self, operation: str) -> None:
        """An operation on an empty matrix, which takes no epoch; but a peer's may not be empty, and has to notice."""
        self.empty_calls[operation] += 1

    def _make(self, operation: str, num_flags: int, half: int, call: str) -> Channel:
        if (old := self.channels.get(operation)) is not None:
            old.leave(self.rank)
        calls = [""] * self.ranks
        dist.all_gather_object(calls, call, group=self.group)
        for peer, other in zip(self.peers, calls, strict=True):
            if other != call:
                raise PeersDiffer(
                    f"rank {self.peers[self.rank]}: {operation} (symmetric) of {call}, on rank {peer} of {other}"
                )
        if old is not None:
            del self.channels[operation]
            num_flags, half = max(num_flags, old.num_flags), max(half, old.half)
        half = aligned(half)
        kind = TorchSegments if self.device.type == "cuda" else PosixSegments
        segments = kind(Channel.size(self.ranks, num_flags, half), self.group, self.device)
        self.channels[operation] = Channel(segments, self.ranks, num_flags, half)
        return self.channels[operation]

    @contextmanager
    def aside(self) -> Iterator[None]:
        """On a GPU, launches inside run beside those of this use that are outside, until `join`."""
        with torch.cuda.stream(self._side):  # of None: as it is
            yield

    def join(self) -> None:
        """What follows comes after everything that was launched aside."""
        if self._side is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._side)

    def check(self, finished: bool = False) -> None:
        """Raise PeerTimeout if a wait was in vain, PeersDiffer if a peer's call was another.

        finished: on a GPU too, where that takes a synchronisation.
        """
        if self.device.type == "cuda" and not finished:
            return
        word = int(self.error[0])
        if word == 0:
            return
        self.error.zero_()
        raise self._told_by(word)

    def _told_by(self, word: int) -> Exception:
        """What the error word of `report` says."""
        word, rank = divmod(word - 1, 4096)
        word, peer = divmod(word, 4096)
        word, differs = divmod(word, 2)
        epoch, operation = divmod(word, 16)
        where = f"in {OPERATIONS[operation]} (symmetric, use {epoch}) over ranks {', '.join(map(str, self.peers))}"
        if differs:
            channel = self.channels[OPERATIONS[operation]]
            if (left := channel.left(epoch)) is not None:
                what = f"rank {self.peers[left]}'s matrix alone needs more memory than any before"
                return PeersDiffer(f"rank {self.peers[rank]}: {what} {where}")
            what = f"rank {self.peers[peer]} has a matrix of another shape or dtype"
            return PeersDiffer(f"rank {self.peers[rank]}: {what} {where}")
        what = f"no word from rank {self.peers[peer]} within the limit of {self.timeout_s:g} s"
        return PeerTimeout(f"rank {self.peers[rank]}: {what} {where}")

    def close(self) -> None:
        """Give the memory back. Collective on GPUs, where a peer's late write would meet whoever has it next."""
        self.check(finished=True)
        if self.channels and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            dist.barrier(self.group)
        self.channels.clear()


def described_use(arch: str, ranks: int, num_flags: int, half: int) -> Use:
    """A use to compile kernels with: on tensors without storage, of an architecture that need not be here."""
    from megapar.kernels.matmul import PROCESSORS

    size = Channel.size(ranks, num_flags, half)
    with torch.device("meta"):
        segments: Any = SimpleNamespace(
            own=torch.empty(size, dtype=torch.uint8), table=torch.empty(ranks, dtype=torch.int64)
        )
        error = torch.empty(1, dtype=torch.int64)
    memory = SimpleNamespace(rank=1, ranks=ranks, arch=arch, processors=PROCESSORS[arch], error=error, limit=1)
    channel = Channel(segments, ranks, num_flags, half, epoch=1)
    return Use(memory, channel, OPERATIONS[0], mark_of(1, ""), channel.flags_at, channel.data_at)


def mark_of(epoch: int, call: str) -> int:
    """What flags are set to: see the top of this file."""
    return epoch << 32 | zlib.crc32(call.encode()) % LEFT


def aligned(size: int) -> int:
    """Bytes, rounded up to where the next part of a segment may begin."""
    return -(-size // ALIGNMENT) * ALIGNMENT
