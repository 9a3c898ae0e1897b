"""A GPU's clock, with events as CUDA has them: the time between two is a float32 of milliseconds."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from megapar.trace.clock import Timeline
from megapar.trace.spans import FLIGHT, IDLE, Span
from tests.virtual_time import VirtualClock

HOURS = 3600.0


class Device:
    """A GPU: it works through what is queued, and an event has the time at which it is reached. A second stream has no
    work.

    host: the clock of the host, which runs ahead of it
    """

    def __init__(self, host: VirtualClock) -> None:
        self.host, self.free, self.aside = host, 0.0, False

    @contextmanager
    def stream(self, other: None) -> Iterator[None]:
        self.aside = True
        yield
        self.aside = False

    def work(self, seconds: float) -> None:
        self.free = max(self.free, self.host.now) + seconds

    def event(self, enable_timing: bool) -> "Event":
        return Event(self)


class Event:
    def __init__(self, device: Device) -> None:
        self.device, self.at = device, float("nan")

    def record(self) -> None:
        now = self.device.host.now
        self.at = now if self.device.aside else max(self.device.free, now)

    def query(self) -> bool:
        return self.at <= self.device.host.now

    def synchronize(self) -> None:
        self.device.host.until(self.at)

    def elapsed_time(self, end: "Event") -> float:
        assert self.query() and end.query(), "CUDA has no time of an event that isn't over"
        return float(np.float32((end.at - self.at) * 1e3))


@pytest.fixture
def device() -> Iterator[Device]:
    with VirtualClock().running() as host:
        made = Device(host)
        cuda: dict[str, Any] = {"Event": made.event, "Stream": lambda: None, "stream": made.stream}
        with mock.patch.multiple(torch.cuda, **cuda):
            yield made


def timeline() -> Timeline:
    return Timeline(torch.device("cuda", 0))


def of_kind(spans: list[Span], kind: str) -> list[Span]:
    return [span for span in spans if span.kind == kind]


@pytest.mark.parametrize("read", [True, False])
def test_times_are_fine_after_ten_hours(device: Device, read: bool) -> None:
    """To a microsecond: against an origin ten hours ago a float32 of milliseconds has steps of 2 to 4 ms."""
    clock = timeline()
    assert np.spacing(np.float32(10 * HOURS * 1e3)) > 2
    for _ in range(10):
        device.work(1 * HOURS)
        clock.take() if read else clock.forget()
    starts = []
    for seconds in (0.0123456, 0.0001234):
        with clock.span("F", "0F0"):
            device.work(seconds)
        [span] = of_kind(clock.take(), "F")
        assert span.seconds == pytest.approx(seconds, abs=1e-6)
        starts.append(span.start)
    assert starts[0] == pytest.approx(10 * HOURS, abs=1e-2)  # each hour's own rounding, 0.25 ms at most
    assert starts[1] - starts[0] == pytest.approx(0.0123456, abs=1e-6)


def test_forgetting_waits_for_nothing(device: Device) -> None:
    clock = timeline()
    for _ in range(1000):
        device.work(1.0)
        with clock.span("F", "0F0"):
            pass
        clock.forget()
    assert device.host.now == 0.0
    device.host.until(device.free)
    clock.forget()
    assert len(clock._clock._origins) == 1  # type: ignore[union-attr]
    assert of_kind(clock.take(), "F") == []


def test_a_step_is_read_while_the_next_one_runs(device: Device) -> None:
    """Reading waits for its end and no longer; a later step's times are none of it."""
    clock, readings = timeline(), []
    for step in range(4):
        clock.forget()
        with clock.span("F", f"0F{step}"):
            device.work(1.0)
        readings.append(clock.cut())
    assert device.host.now == 0.0
    for step in (1, 0, 3):
        [span] = of_kind(readings[step].spans(), "F")
        assert (span.name, span.start, span.stop) == (f"0F{step}", pytest.approx(step), pytest.approx(step + 1.0))
        assert readings[step].seconds == pytest.approx(1.0)
        assert device.host.now == max(step + 1.0, 2.0)


def test_a_device_with_work_is_not_idle(device: Device) -> None:
    """The host runs ahead: 1 ms of Python for 10 ms of work. Only until the first work comes there is none."""
    clock = timeline()
    for _ in range(3):
        device.host.sleep(0.001)
        with clock.span("F", "0F0"):
            device.work(0.010)
    spans = clock.take()
    assert [(span.start, span.stop) for span in of_kind(spans, IDLE)] == [(0.0, pytest.approx(0.001))]
    assert [span.seconds for span in of_kind(spans, "F")] == [pytest.approx(0.010)] * 3


def test_a_late_host_leaves_the_device_idle(device: Device) -> None:
    """10 ms of Python for 1 ms of work: the F lasts 10 ms on the stream too, and all of it counts as idle at most."""
    clock = timeline()
    for _ in range(3):
        with clock.span("F", "0F0"):
            device.work(0.001)
            device.host.sleep(0.010)
    spans = clock.take()
    assert [span.seconds for span in of_kind(spans, "F")] == [pytest.approx(0.010)] * 3
    assert sum(span.seconds for span in of_kind(spans, IDLE)) == pytest.approx(0.030)


def test_a_device_that_waits_for_a_message_is_not_idle(device: Device) -> None:
    clock = timeline()
    with clock.span("pp", "receive"):
        device.work(0.5)  # the stream stands; the host has gone on
    assert sum(span.seconds for span in of_kind(clock.take(), IDLE)) == 0.0


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_what_is_fine_is_timed_in_detail_only(kind: str, device: Device) -> None:
    clock = Timeline(torch.device(kind))
    future = SimpleNamespace(add_done_callback=lambda call: call(None))
    wait = mock.Mock()
    work: Any = SimpleNamespace(wait=wait, get_future=lambda: future)
    for detailed in (False, True):
        clock.detailed = detailed
        with clock.span("matmul", "matmul 1/2", fine=True):
            pass
        assert clock.in_flight("sum", lambda: work) is work
        found = {span.kind for span in clock.take()}
        assert found - {IDLE} == ({"matmul", FLIGHT} if detailed else set())
        assert wait.call_count == (detailed and kind == "cuda")


def test_an_error_in_a_fine_span_is_named_all_the_same() -> None:
    clock = Timeline(torch.device("cpu"))
    with pytest.raises(RuntimeError) as error, clock.span("matmul", "matmul 1/2", " over tp", fine=True):
        raise RuntimeError
    assert error.value.__notes__ == ["in matmul 1/2 over tp"]
