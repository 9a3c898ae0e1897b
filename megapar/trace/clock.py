"""A rank's clock: spans of computation and of waiting for communication."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megapar.trace.announcements import Announcements
from megapar.trace.board import board
from megapar.trace.spans import FLIGHT, IDLE, Span

# A mark that the device passes this soon after the host set it found its queue empty: a launch takes 5 to 10 us to get
# there, and the two clocks are set by each other with as much of an error.
CAUGHT_UP_S = 50e-6


Spans = list[tuple[str, str, Any, Any]]  # kind, name, and two marks of the clock


class Timeline:
    """Collects spans; `cut` hands over those since the last call.

    On a CPU a span is timed on the host. On CUDA work and waits happen on the stream, so a pair of events brackets a
    span. Spans of kind IDLE come with those of a GPU.

    What is not fine is also written on the rank's board (`megapar.trace.board`), where others see what this rank does.

    announcements: what ranks compare of their collectives; None: nothing
    listeners: called at the start of each such span and of what is only written there, with its kind and name.
    detailed: whether what is fine is timed too: the pieces of a matmul, and how long a collective is in flight. For
    steps whose timeline is looked at; each costs two events on CUDA.
    """

    def __init__(self, device: torch.device) -> None:
        self.detailed = self._muted = False
        self._clock = _DeviceClock() if device.type == "cuda" else _HostClock()
        self._spans: Spans = []
        self._board = board()
        self.announcements: Announcements | None = None
        self.listeners: list[Callable[[str, str], None]] = []

    @contextmanager
    def span(
        self, kind: str, name: str, where: str = "", *, fine: bool = False, waiting: bool = False
    ) -> Iterator[None]:
        """Time what runs inside. An error inside gets a note that names it, and `where`.

        waiting: whether other ranks take part in it
        """
        timed = (self.detailed or not fine) and not self._muted
        start = self._clock.mark() if timed else None
        try:
            depth = None if fine else self._begin(kind, name, where, waiting)
            yield
        except Exception as error:
            error.add_note(f"in {name}{where}")
            raise
        if depth is not None:
            self._board.leave(depth)
        if timed:
            self._spans.append((kind, name, start, self._clock.mark()))

    @contextmanager
    def doing(self, kind: str, name: str, *, waiting: bool = False) -> Iterator[None]:
        """Write on the board what runs inside, and time nothing."""
        depth = self._begin(kind, name, "", waiting)
        yield
        self._board.leave(depth)

    def passing(self, kind: str, name: str) -> None:
        """A point of an operation, for listeners; on the board for as long as they take."""
        self._told(kind, name)

    def _begin(self, kind: str, name: str, where: str, waiting: bool) -> int:
        self._told(kind, name, where)  # for as long as that takes, the rank waits for nobody
        return self._board.enter(name + where, waiting)

    def _told(self, kind: str, name: str, where: str = "") -> None:
        if self.listeners:
            depth = self._board.enter(name + where, False)
            self.tell(kind, name)
            self._board.leave(depth)

    def tell(self, kind: str, name: str) -> None:
        """Tell listeners alone, from any thread."""
        for listen in self.listeners:
            listen(kind, name)

    def in_flight(self, name: str, start: Callable[[], dist.Work]) -> dist.Work:
        """Start an asynchronous operation and, if detailed, time until it is over, whenever that is waited for."""
        if not self.detailed or self._muted:
            return start()
        begun = self._clock.mark()
        work = start()
        self._clock.at_the_end_of(work, lambda over: self._spans.append((FLIGHT, name, begun, over)))
        return work

    @contextmanager
    def muted(self) -> Iterator[None]:
        """Inside, nothing is timed: what is recorded for later takes no time."""
        self._muted = True
        try:
            yield
        finally:
            self._muted = False

    def forget(self) -> None:
        """Drop the spans so far, without a look at them: nothing is waited for."""
        self._spans.clear()
        self._clock.begin()

    def cut(self) -> "Reading":
        """The spans up to here, to be read whenever it suits: what is timed from here on belongs to the next."""
        spans, self._spans = self._spans, []
        return Reading(self._clock.cut(), spans)

    def take(self) -> list[Span]:
        """The spans up to here. On a GPU that waits until it has come so far."""
        return self.cut().spans()


class Reading:
    """What was timed up to a cut. seconds: from the begin of that to the cut on a GPU's stream, once spans are read;
    None on a CPU."""

    def __init__(self, part: "_DevicePart | None", spans: Spans) -> None:
        self._part, self._spans, self.seconds = part, spans, None if part is None else 0.0

    def spans(self) -> list[Span]:
        if self._part is None:
            return [Span(*span) for span in self._spans]
        at, idle, self.seconds = self._part.read()
        return [*(Span(kind, name, at(start), at(stop)) for kind, name, start, stop in self._spans), *idle]


class _HostClock:
    """Marks are seconds."""

    def mark(self) -> float:
        return time.perf_counter()

    def at_the_end_of(self, work: dist.Work, then: Callable[[float], None]) -> None:
        work.get_future().add_done_callback(lambda future: then(self.mark()))

    def begin(self) -> None:
        pass

    def cut(self) -> None:
        pass


class _Mark(NamedTuple):
    event: torch.cuda.Event
    host: float  # when it was set

    def since(self, other: "_Mark") -> float:
        """Seconds on the device; both are over."""
        return other.event.elapsed_time(self.event) / 1000


@dataclass(eq=False)
class _Origin:
    """seconds: since the first origin, once that is known."""

    mark: _Mark
    seconds: float | None = None


class _DeviceClock:
    """Marks are events on the stream that computes.

    The time between two events is a float32 of milliseconds: after an hour its step is 0.25 ms. So marks are read
    against an origin that every `begin` and every `cut` set anew; how far the origins are apart is summed in fp64.
    """

    def __init__(self) -> None:
        self._observer, self._no_work = torch.cuda.Stream(), torch.cuda.Stream()
        self._marks: list[_Mark] = []
        self._origins = deque([_Origin(self._record(), 0.0)])  # the first one's seconds are known

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
        self._marks = []
        self._origins.append(_Origin(self._record()))
        while len(self._origins) > 1 and self._origins[1].mark.event.query():
            self._next_origin()

    def _next_origin(self) -> None:
        first, second = self._origins.popleft(), self._origins[0]
        assert first.seconds is not None
        second.seconds = first.seconds + second.mark.since(first.mark)

    def cut(self) -> "_DevicePart":
        """What was marked since the last origin, and begin anew."""
        marks, origin = self._marks, self._origins[-1]
        self.begin()
        return _DevicePart(self, origin, marks, self._origins[-1].mark)

    def seconds_of(self, origin: _Origin) -> float:
        """Seconds from the first origin to this one, which is over."""
        while origin.seconds is None:
            self._next_origin()
        return origin.seconds

    def ahead_of(self, origin: _Origin) -> float:
        """The host's time at an origin's. What is recorded on a stream without work is at once over."""
        with torch.cuda.stream(self._no_work):
            now = self._record()
        now.event.synchronize()
        return now.host - now.since(origin.mark)


@dataclass(frozen=True)
class _DevicePart:
    """The marks from an origin to the next, `stop`."""

    clock: _DeviceClock
    origin: _Origin
    marks: list[_Mark]
    stop: _Mark

    def read(self) -> tuple[Callable[[_Mark], float], list[Span], float]:
        """(the seconds of a mark, spans in which the device had no more work, seconds from the origin to the stop).

        Waits for the stop, and for nothing that was started after it.
        """
        self.stop.event.synchronize()
        before, ahead = self.clock.seconds_of(self.origin), self.clock.ahead_of(self.origin)
        since = [mark.since(self.origin.mark) for mark in (self.origin.mark, *self.marks)]
        idle = [
            Span(IDLE, "no work", before + start, before + stop)
            for start, stop, mark in zip(since, since[1:], self.marks, strict=False)
            if stop + ahead - mark.host < CAUGHT_UP_S
        ]
        return lambda mark: before + mark.since(self.origin.mark), idle, self.stop.since(self.origin.mark)
