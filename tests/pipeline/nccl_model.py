"""What NCCL would do with the calls of a run's ranks: whether all get through, or who waits for whom.

It stands in for GPUs. What it assumes of ProcessGroupNCCL without `device_id`, each read in its source and none of it
seen on two GPUs yet:
1. Blocking first use: the host waits at the first operation over a communicator (a group's own, or of a pair of its
   ranks) until all its members are there, and of a pair again at the first message in either direction.
2. One queue per communicator: operations over it run one after another, whichever way they go.
3. Rendezvous: a send ends only together with its receive, when both are at the head of their queues. A collective ends
   when it is at the head of all its members' queues.
4. A hardware queue for every stream: a receive that waits holds up no other stream (`CUDA_DEVICE_MAX_CONNECTIONS`).
5. Otherwise the host runs ahead. Computation waits for what `wait` names, an operation for the computation before it.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist

from megapar.mesh import Mesh


class Communicator(NamedTuple):
    """A group's own, or of two of its ranks."""

    group: tuple[str, tuple[int, ...]]
    ranks: tuple[int, ...]


class Operation(NamedTuple):
    """The `number`-th of its kind over a communicator. source: of a message."""

    communicator: Communicator
    source: int | None
    number: int

    def __str__(self) -> str:
        (name, _), ranks = self.communicator
        return f"{name} {'-'.join(map(str, ranks))} " + ("sum" if self.source is None else f"from {self.source}")


class Call(NamedTuple):
    """One of a rank's host: `start` an operation, `wait` for it on the device, or `sync`: the host waits for all."""

    kind: str
    operation: Operation | None = None


@dataclass
class Recorder:
    """Stands for `torch.distributed` in one rank and writes down its calls."""

    rank: int
    world: int
    calls: list[Call] = field(default_factory=list)
    _numbers: Counter = field(default_factory=Counter)
    _groups: Counter = field(default_factory=Counter)

    def start(self, group: tuple[str, tuple[int, ...]], ranks: Sequence[int], source: int | None) -> Any:
        communicator = Communicator(group, tuple(sorted(ranks)))
        operation = Operation(communicator, source, self._numbers[communicator, source])
        self._numbers[communicator, source] += 1
        self.calls.append(Call("start", operation))
        wait = lambda: self.calls.append(Call("wait", operation))  # noqa: E731
        return SimpleNamespace(wait=wait, is_completed=lambda: False)

    def isend(self, tensor: torch.Tensor, dst: int, group: Any) -> Any:
        return self.start(group, (self.rank, dst), self.rank)

    def irecv(self, tensor: torch.Tensor, src: int, group: Any) -> Any:
        tensor.zero_()
        return self.start(group, (self.rank, src), src)

    def all_reduce(self, tensor: torch.Tensor, group: Any) -> None:
        self.start(group, group[1], None).wait()

    def new_group(self, ranks: Sequence[int] | None = None, **options: Any) -> tuple[str, tuple[int, ...]]:
        ranks = range(self.world) if ranks is None else ranks
        self._groups[tuple(ranks)] += 1
        return f"group {self._groups[tuple(ranks)]}", tuple(ranks)

    @contextmanager
    def stand_in(self, backend: str = "nccl") -> Iterator[None]:
        functions = {name: getattr(self, name) for name in ("isend", "irecv", "all_reduce", "new_group")}
        with ExitStack() as patches:
            patches.enter_context(mock.patch.multiple(dist, **functions, get_backend=lambda: backend))
            stand_in: Any = ("world", tuple(range(self.world)))
            patches.callback(setattr, dist.GroupMember, "WORLD", dist.GroupMember.WORLD)
            dist.GroupMember.WORLD = stand_in
            sync = lambda mesh: self.calls.append(Call("sync"))  # noqa: E731
            patches.enter_context(mock.patch.object(Mesh, "_synchronize", sync))
            yield


def calls_of(world: int, run: Callable[[int], Any], backend: str = "nccl") -> list[list[Call]]:
    """The calls of every rank's run(rank), one rank after another."""
    recorders = [Recorder(rank, world) for rank in range(world)]
    for recorder in recorders:
        with recorder.stand_in(backend):
            run(recorder.rank)
    return [recorder.calls for recorder in recorders]


class Simulation:
    """Lets the ranks' calls run until nothing moves any more.

    connected: whether every communicator is ready beforehand, so that no first use blocks.
    """

    def __init__(self, programs: Sequence[Sequence[Call]], *, connected: bool = False) -> None:
        self.programs, self.connected = programs, connected
        self.at = [0] * len(programs)  # the host's next call
        self.queues: list[dict[Communicator, deque[tuple[Operation, int]]]] = [defaultdict(deque) for _ in programs]
        self.waits: list[list[Operation]] = [[] for _ in programs]  # of each rank's computation, in order
        self.computed = [0] * len(programs)  # how many of its waits are over
        self.done: set[Operation] = set()
        self.ready: set[tuple[Communicator, int | None]] = set()

    def stuck(self) -> list[str]:
        """Run. What each rank that did not get through is held up by; empty if all did."""
        while any([self._host(rank) for rank in range(len(self.programs))] + [self._computation(), self._network()]):
            pass
        return [line for rank in range(len(self.programs)) if (line := self._held_up(rank))]

    def _call(self, rank: int) -> Call | None:
        program = self.programs[rank]
        return program[self.at[rank]] if self.at[rank] < len(program) else None

    def _host(self, rank: int) -> bool:
        before = self.at[rank]
        while call := self._call(rank):
            if call.kind == "sync" and (any(self.queues[rank].values()) or self._waiting(rank)):
                break
            if call.operation is not None and call.kind == "wait":
                self.waits[rank].append(call.operation)
            elif call.operation is not None:
                if not self._met(call.operation):
                    break
                queue = self.queues[rank][call.operation.communicator]
                queue.append((call.operation, len(self.waits[rank])))
            self.at[rank] += 1
        return self.at[rank] > before

    def _met(self, operation: Operation) -> bool:
        """Whether its communicator is ready, and of a message its direction; else whether all are there to make it."""
        communicator = operation.communicator
        for first in {(communicator, None), (communicator, operation.source)} - self.ready:
            if self.connected:
                continue
            for rank in communicator.ranks:
                call = self._call(rank)
                peer = call.operation if call is not None and call.kind == "start" else None
                if peer is None or peer.communicator != communicator or first[1] not in (None, peer.source):
                    return False
            self.ready.add(first)
        return True

    def _waiting(self, rank: int) -> bool:
        return self.computed[rank] < len(self.waits[rank])

    def _computation(self) -> bool:
        moved = False
        for rank, waits in enumerate(self.waits):
            while self._waiting(rank) and waits[self.computed[rank]] in self.done:
                self.computed[rank] += 1
                moved = True
        return moved

    def _network(self) -> bool:
        heads = Counter[Operation]()
        for rank, queues in enumerate(self.queues):
            for queue in queues.values():
                if queue and self.computed[rank] >= queue[0][1]:
                    heads[queue[0][0]] += 1
        over = {operation for operation, count in heads.items() if count == len(operation.communicator.ranks)}
        for queues in self.queues:
            for queue in queues.values():
                if queue and queue[0][0] in over:
                    queue.popleft()
        self.done |= over
        return bool(over)

    def _held_up(self, rank: int) -> str:
        if call := self._call(rank):
            return f"the host of rank {rank} by {call.operation or call.kind}"
        heads = [str(queue[0][0]) for queue in self.queues[rank].values() if queue]
        return f"rank {rank} by {', '.join(heads)}" if heads or self._waiting(rank) else ""
