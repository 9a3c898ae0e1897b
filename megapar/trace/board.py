"""What each rank is doing right now, in memory that other processes of the host read.

Every operation passes `Timeline.span` or `Timeline.doing`, which write it here: no lock, no collective. What is written
outlives a rank that is killed or stopped. The memory belongs to whoever started the ranks (`Memory.create`)
and goes with that process, however it ends: it has no name in any file system.

A slot of a rank has a page: a byte, odd while the rank writes (one byte is written at once, as no larger number is);
operations begun; when this one began and when the rank's thread last gave a heartbeat, both of the host's monotonic
clock; step; process; texts.
"""

import faulthandler
import mmap
import os
import re
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

NAME = "megapar-board"
PATH = re.compile(r"/proc/\d+/fd/\d+")  # of such memory
PAGE = 4096
BEAT_S = 0.2  # between heartbeats
_HEAD = struct.Struct("=Qdq?192s192s")  # operations begun, since, step, waiting, operation, the one around it
_BEAT = struct.Struct("=dq")  # heartbeat, process
_ASKED_AT, _BEAT_AT, _HEAD_AT = 1, 8, 24  # bytes of a slot behind the odd or even one; asked: for Python stacks


@dataclass(frozen=True)
class Doing:
    """What a rank is doing.

    operation: "all_reduce over tp of ranks 0, 1"; within: the operation around it, such as "1B0"; empty for none.
    waiting: whether other ranks take part in it. since, beat: seconds of the monotonic clock; beat: of the last sign of
    life. step: 0 before the first. pid: 0 until the rank is there. count: operations begun so far.
    """

    rank: int
    pid: int
    step: int
    operation: str
    within: str
    waiting: bool
    since: float
    beat: float
    count: int

    @property
    def text(self) -> str:
        """The operation in words, with the step."""
        where = f" in {self.within}" if self.within and not self.operation.startswith(self.within) else ""
        return f"step {self.step}, {self.operation}{where}" if self.step else f"{self.operation}{where}"


class Memory:
    """The slots of a host's ranks, by local rank."""

    def __init__(self, descriptor: int, ranks: int, write: bool = True) -> None:
        self.descriptor, self.ranks = descriptor, ranks
        self.map = mmap.mmap(descriptor, ranks * PAGE, access=mmap.ACCESS_WRITE if write else mmap.ACCESS_READ)

    @classmethod
    def create(cls, ranks: int) -> "Memory | None":
        """Memory without a name, which ends with the last process that has it; None where the system has none."""
        if not hasattr(os, "memfd_create"):
            return None
        descriptor = os.memfd_create(NAME)
        os.ftruncate(descriptor, ranks * PAGE)
        return cls(descriptor, ranks)

    @property
    def path(self) -> str:
        """Where other processes of this user open it for as long as this one lives."""
        return f"/proc/{os.getpid()}/fd/{self.descriptor}"

    def close(self) -> None:
        self.map.close()
        os.close(self.descriptor)

    def read(self, slot: int) -> Doing:
        """What a rank is doing. One that is ended in the middle of writing is read as it is."""
        at = slot * PAGE
        beat, pid = _BEAT.unpack_from(self.map, at + _BEAT_AT)
        for attempt in range(100):
            written = self.map[at]
            count, since, step, waiting, *texts = _HEAD.unpack_from(self.map, at + _HEAD_AT)
            if written % 2 == 0 and written == self.map[at]:
                break
            if attempt > 10:
                time.sleep(0.001)
        else:
            since = beat  # half of a number may be written
        operation, within = (text.rstrip(b"\0").decode(errors="replace") for text in texts)
        return Doing(slot, pid, step, operation or "not started", within, waiting, since, beat, count)

    def show(self, doing: Doing) -> None:
        """Write what a rank of another host does, as it said there."""
        at, texts = doing.rank * PAGE, (doing.operation.encode(), doing.within.encode())
        _BEAT.pack_into(self.map, at + _BEAT_AT, doing.beat, doing.pid)
        _HEAD.pack_into(self.map, at + _HEAD_AT, doing.count, doing.since, doing.step, doing.waiting, *texts)

    def clear(self, slot: int) -> None:
        """A rank has ended: it is no longer there."""
        _BEAT.pack_into(self.map, slot * PAGE + _BEAT_AT, 0.0, 0)

    def ask_for_stacks(self, slot: int) -> None:
        """Have a rank's thread write the Python stacks of all its threads, see `Board.beat`."""
        self.map[slot * PAGE + _ASKED_AT] = 1

    def stacks_written(self, slot: int) -> None:
        self.map[slot * PAGE + _ASKED_AT] = 0

    def has_asked(self, slot: int) -> bool:
        """Whether a rank has not yet written the stacks that it was asked for."""
        return self.map[slot * PAGE + _ASKED_AT] == 1


def open_memory(path: str, write: bool = True) -> Memory:
    """The memory of another process. Raises OSError when that process has ended."""
    # A number of a process that has ended is used again; and who wrote the path may be a stranger.
    if not PATH.fullmatch(path) or not os.readlink(path).startswith(f"/memfd:{NAME}"):
        raise FileNotFoundError(path)
    descriptor = os.open(path, os.O_RDWR if write else os.O_RDONLY)
    return Memory(descriptor, os.fstat(descriptor).st_size // PAGE, write)


class Board:
    """Where this rank writes what it does. memory: None: nowhere."""

    def __init__(self, memory: Memory | None = None, slot: int = 0) -> None:
        self.memory, self.slot = memory, slot
        self.step = 0
        self._at, self._count, self._over = slot * PAGE, 0, False
        self._thread: threading.Thread | None = None
        self._stack: list[tuple[bytes, bool]] = []

    @contextmanager
    def doing(self, operation: str, waiting: bool = False) -> Iterator[None]:
        """Write an operation for as long as it lasts; one that fails stays, so that it can be named."""
        depth = self.enter(operation, waiting)
        yield
        self.leave(depth)

    def enter(self, operation: str, waiting: bool = False) -> int:
        """Begin an operation. Returns what `leave` is given at its end."""
        self._stack.append((operation.encode(), waiting))
        self._write()
        return len(self._stack) - 1

    def leave(self, depth: int) -> None:
        """End an operation, and those inside it that failed."""
        del self._stack[depth:]
        self._write()

    def at_step(self, step: int) -> None:
        """The step that follows."""
        self.step = step
        self._write()

    def _write(self) -> None:
        if self.memory is None:
            return
        memory, at, stack = self.memory.map, self._at, self._stack
        text, waiting = stack[-1] if stack else (b"between operations", False)
        within = stack[-2][0] if len(stack) > 1 else b""
        self._count = count = self._count + 1
        memory[at] = (2 * count - 1) & 255
        _HEAD.pack_into(memory, at + _HEAD_AT, count, time.monotonic(), self.step, waiting, text, within)
        memory[at] = 2 * count & 255

    def live(self, stacks: str) -> None:
        """Give heartbeats from a thread from now on. When asked, it writes the stacks of all threads to the file
        `stacks`: a thread can while the others wait, and needs no signal."""
        if self.memory is None:
            return
        self._beat()
        self._thread = threading.Thread(target=self._beats, args=(stacks,), name="heartbeat", daemon=True)
        self._thread.start()

    def _beats(self, stacks: str) -> None:
        memory = self.memory
        assert memory is not None
        while not self._over:
            self._beat()
            if memory.has_asked(self.slot):
                with suppress(OSError), open(stacks, "a", encoding="utf-8") as file:
                    print(f"rank of process {os.getpid()}: {memory.read(self.slot).text}", file=file, flush=True)
                    faulthandler.dump_traceback(file, all_threads=True)
                memory.stacks_written(self.slot)
            time.sleep(BEAT_S)

    def end(self) -> None:
        """This rank has done its work; whatever its process still does is nobody's concern."""
        if self.memory is not None:
            self._over = True
            if self._thread is not None:
                self._thread.join(BEAT_S + 1.0)  # or it would write once more
            self.memory.clear(self.slot)

    def _beat(self) -> None:
        assert self.memory is not None
        _BEAT.pack_into(self.memory.map, self._at + _BEAT_AT, time.monotonic(), os.getpid())


_board = Board()


def board() -> Board:
    """The one of this rank."""
    return _board


def set_board(own: Board) -> None:
    """Make `own` what `board()` returns in this process."""
    global _board
    _board = own
