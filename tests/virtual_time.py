"""A clock that nothing but a test moves, so that what is timed is the same on any machine, however busy."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

COLLECTIVES = ("all_reduce", "all_gather", "all_gather_single", "all_to_all_single", "reduce_scatter_single")


class VirtualClock:
    """The time of one rank: `time.sleep` moves it on, and so does a wait for what comes later. Nothing else takes time.

    Messages and collectives carry the time (Lamport 1978): one arrives `transfer` seconds after it was sent, a
    collective `transfer` seconds after its last rank came. All ranks of a group need such a clock. Transfers don't get
    in each other's way.
    """

    def __init__(self, transfer: float = 0.0) -> None:
        self.now, self.transfer = 0.0, transfer
        self.real = {name: getattr(dist, name) for name in (*COLLECTIVES, "isend", "irecv")}

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.now += seconds

    def until(self, seconds: float) -> None:
        self.now = max(self.now, seconds)

    @contextmanager
    def running(self) -> Iterator["VirtualClock"]:
        """Inside, time and torch.distributed of this process go by this clock."""
        with ExitStack() as patches:
            patches.enter_context(mock.patch.object(time, "perf_counter", lambda: self.now))
            patches.enter_context(mock.patch.object(time, "sleep", self.sleep))
            patches.enter_context(mock.patch.object(dist, "isend", self._isend))
            patches.enter_context(mock.patch.object(dist, "irecv", self._irecv))
            for name in COLLECTIVES:
                patches.enter_context(mock.patch.object(dist, name, self._collective(self.real[name])))
            yield self

    def _isend(self, tensor: torch.Tensor, dst: int, group: Any = None) -> "Transfer":
        sent = torch.tensor([self.now], dtype=torch.float64)
        works = [self.real["isend"](one, dst, group=group) for one in (tensor, sent)]
        return Transfer(self, works, sent)

    def _irecv(self, tensor: torch.Tensor, src: int, group: Any = None) -> "Transfer":
        sent = torch.empty(1, dtype=torch.float64)
        works = [self.real["irecv"](one, src, group=group) for one in (tensor, sent)]
        return Transfer(self, works, sent)

    def _collective(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def collective(*args: Any, group: Any = None, async_op: bool = False) -> "Transfer | None":
            last = torch.tensor([self.now], dtype=torch.float64)
            works = [real(*args, group=group, async_op=True)]
            works.append(self.real["all_reduce"](last, dist.ReduceOp.MAX, group=group, async_op=True))
            transfer = Transfer(self, works, last)
            if async_op:
                return transfer
            transfer.wait()
            return None

        return collective


class Transfer:
    """What is under way by a virtual clock: as much of `dist.Work` as is asked for."""

    def __init__(self, clock: VirtualClock, works: list[Any], sent: torch.Tensor) -> None:
        self.clock, self.works, self.sent, self.transfer = clock, works, sent, clock.transfer
        self.callbacks: list[Callable[[Any], None]] = []

    def wait(self) -> None:
        """What is to be done at its end is done at its end, though that is noticed only now."""
        for work in self.works:
            work.wait()
        arrival, now = float(self.sent) + self.transfer, self.clock.now
        self.clock.now = arrival
        for callback in self.callbacks:
            callback(self)
        self.callbacks.clear()
        self.clock.now = max(arrival, now)

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self.works)

    def get_future(self) -> "Transfer":
        return self

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self.callbacks.append(callback)
