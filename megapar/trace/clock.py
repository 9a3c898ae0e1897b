"""A rank's clock: spans of computation and of waiting for communication."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megapar.trace.spans import FLIGHT, IDLE, Span

# A mark that the device passes this soon after the host set it found its queue empty: a launch takes 5 to 10 us to get
# there, and the two clocks are set by each other with as much of an error.
CAUGHT_UP_S = 50e-6


class Timeline:
    """Collects spans; `take` returns those since the last call.

    On a CPU a span is timed on the host. On CUDA work and waits happen on the stream, so a pair of events brackets a
    span, and `take` synchronises the device once to read them. It adds spans of kind IDLE then.

    detailed: whether what is fine is timed too: the pieces of a matmul, and how long a collective is in flight. For
    steps whose timeline is looked at; each costs two events on CUDA.
    """

    def __init__(self, device: torch.device) -> None:
        self.detailed = False
        self._clock = _DeviceClock() if device.type == "cuda" else _HostClock()
        self._spans: list[tuple[str, str, Any, Any]] = []

    @contextmanager
    def span(self, kind: str, name: str, where: str = "", *, fine: bool = False) -> Iterator[None]:
        """Time what runs inside. An error inside gets a note that names it, and `where`."""
        timed = self.detailed or not fine
        start = self._clock.mark() if timed else None
        try:
            yield
        except Exception as error:
            error.add_note(f"in {name}{where}")
            raise
        if timed:
            self._spans.append((kind, name, start, self._clock.mark()))

    def in_flight(self, name: str, start: Callable[[], dist.Work]) -> dist.Work:
        """Start an asynchronous operation and, if detailed, time until it is over, whenever that is waited for."""
        if not self.detailed:
            return start()
        begun = self._clock.mark()
        work = start()
        self._clock.at_the_end_of(work, lambda over: self._spans.append((FLIGHT, name, begun, over)))
        return work

    def forget(self) -> None:
        """Drop the spans so far, without a look at them: nothing is waited for."""
        self._spans.clear()
        self._clock.begin()

    def take(self) -> list[Span]:
        spans, self._spans = self._spans, []
        at, idle = self._clock.read()
        return [*(Span(kind, name, at(start), at(stop)) for kind, name, start, stop in spans), *idle]


class _HostClock:
    """Marks are seconds."""

    def mark(self) -> float:
        return time.perf_counter()

    def at_the_end_of(self, work: dist.Work, then: Callable[[float], None]) -> None:
        work.get_future().add_done_callback(lambda future: then(self.mark()))

    def begin(self) -> None:
        pass

    def read(self) -> tuple[Callable[[float], float], list[Span]]:
        return lambda mark: mark, []


class _Mark(NamedTuple):
    event: torch.cuda.Event
    host: float  # when it was set


class _DeviceClock:
    """Marks are events on the stream that computes.

    The time between two events is a float32 of milliseconds: after an hour its step is 0.25 ms. So marks are read
    against an origin that every `begin` and every `read` set anew; how far the origins are apart is summed in fp64.
    """

    def __init__(self) -> None:
        self._observer = torch.cuda.Stream()
        self._before = 0.0  # seconds from the first origin to the oldest of `_origins`
        self._origins: deque[_Mark] = deque()
        self._marks: list[_Mark] = []
        self.begin()

    def mark(self) -> _Mark:
        mark = self._record()
        self._marks.append(mark)
        return mark

    def _record(self) -> _Mark:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return _Mark(event, time.perf_counter())

    def at_the_end_of(self, work: dist.Work, then: Callable[[_Mark], None]) -> None:
        with torch.cuda.stream(self._observer):  # waits in the place of the stream that computes
            work.wait()
            then(self._record())

    def begin(self) -> None:
        """From here on marks are read against a new origin."""
        self._marks.clear()
        self._origins.append(self._record())
        while len(self._origins) > 1 and self._origins[1].event.query():
            self._next_origin()

    def _next_origin(self) -> None:
        self._before += _seconds(self._origins.popleft(), self._origins[0])

    def read(self) -> tuple[Callable[[_Mark], float], list[Span]]:
        """(the seconds of a mark, spans in which the device had no more work), and begin anew."""
        torch.cuda.synchronize()
        while len(self._origins) > 1:
            self._next_origin()
        origin, before, marks = self._origins[0], self._before, self._marks[:]
        self.begin()
        self._origins[-1].event.synchronize()
        now = self._origins[-1]
        # How far the device's time is behind the host's: both are known of the origin that was just set.
        ahead = now.host - (before + _seconds(origin, now))
        at = lambda mark: before + _seconds(origin, mark)  # noqa: E731
        times = [at(mark) for mark in [origin, *marks]]
        idle = [
            Span(IDLE, "no work", start, stop)
            for start, stop, mark in zip(times, times[1:], marks, strict=False)
            if stop + ahead - mark.host < CAUGHT_UP_S
        ]
        return at, idle


def _seconds(start: _Mark, stop: _Mark) -> float:
    return start.event.elapsed_time(stop.event) / 1000
