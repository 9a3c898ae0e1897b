"""A rank's clock: spans of computation and of waiting for communication."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from megapar.trace.spans import FLIGHT, Span


class Timeline:
    """Collects spans; `take` returns those since the last call.

    On a CPU a span is timed on the host. On CUDA work and waits happen on the stream, so a pair of events brackets a
    span, and `take` synchronises the device once to read them.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple] = []
        self._origin = self._mark()
        self._observer = torch.cuda.Stream() if self._cuda else None

    def _mark(self):
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def span(self, kind: str, name: str, where: str = "") -> Iterator[None]:
        """Time what runs inside. An error inside gets a note that names it, and `where`."""
        start = self._mark()
        try:
            yield
        except Exception as error:
            error.add_note(f"in {name}{where}")
            raise
        self._spans.append((kind, name, start, self._mark()))

    def in_flight(self, name: str, start: Callable[[], dist.Work]) -> dist.Work:
        """Start an asynchronous operation and time until it is over, whenever that is waited for."""
        begun, kind = self._mark(), FLIGHT
        work = start()
        if self._cuda:
            with torch.cuda.stream(self._observer):  # waits in the place of the stream that computes
                work.wait()
                self._spans.append((kind, name, begun, self._mark()))
        else:
            over = lambda future: self._spans.append((kind, name, begun, self._mark()))  # noqa: E731
            work.get_future().add_done_callback(over)
        return work

    def forget(self) -> None:
        """Drop the spans so far, without a look at them: nothing is waited for."""
        self._spans.clear()

    def take(self) -> list[Span]:
        spans, self._spans = self._spans, []
        if not self._cuda:
            return [Span(*span) for span in spans]
        torch.cuda.synchronize()
        at = self._origin.elapsed_time
        return [Span(kind, name, at(start) / 1000, at(stop) / 1000) for kind, name, start, stop in spans]
