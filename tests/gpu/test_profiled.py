"""What is said of a GPU's idle time beside a profile of it, with a device as `tests/trace` has it."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from experiments.gpu.profiled import Kernels
from experiments.gpu.run import Run
from experiments.gpu.sections.profile import idle_beside
from experiments.gpu.table import RowFile, read_rows
from megapar.trace.clock import Timeline
from tests.trace.test_clock import Device
from tests.virtual_time import VirtualClock

MS = 1e-3


def fed(clock: Timeline, host: Callable[[float], None], work: Callable[[float], None]) -> None:
    """1 ms of Python for 10 ms of work."""
    for _ in range(8):
        with clock.span("F", "0F0"):
            host(1 * MS)
            work(10 * MS)


def paused(clock: Timeline, host: Callable[[float], None], work: Callable[[float], None]) -> None:
    """Between two spans the host waits for the device, and for 100 ms more."""
    fed(clock, host, work)
    with clock.span("pp", "wait"):
        host(72 * MS + 1 * MS)
    host(100 * MS)
    fed(clock, host, work)


def unseen(clock: Timeline, host: Callable[[float], None], work: Callable[[float], None]) -> None:
    """10 ms of Python, then one kernel that is not over at the span's end."""
    for _ in range(8):
        with clock.span("F", "0F0"):
            host(10 * MS)
            work(2 * MS)


def exaggerated(clock: Timeline, host: Callable[[float], None], work: Callable[[float], None]) -> None:
    """10 ms of work, over just before the host is at the span's end."""
    for _ in range(8):
        with clock.span("F", "0F0"):
            work(10 * MS)
            host(10.1 * MS)


@pytest.mark.parametrize(
    ("step", "above", "below"),
    [(fed, True, True), (paused, True, True), (unseen, True, False), (exaggerated, False, True)],
)
def test_idle_time_beside_a_profile(step: Callable[..., None], above: bool, below: bool, tmp_path: Path) -> None:
    kernels = Kernels()
    with VirtualClock().running() as host:
        device = Device(host)

        def work(seconds: float) -> None:
            device.work(seconds)
            kernels.append(("kernel", 1e6 * (device.free - seconds), 1e6 * device.free))

        cuda: dict[str, Any] = {"Event": device.event, "Stream": lambda: None, "stream": device.stream}
        with mock.patch.multiple(torch.cuda, **cuda):
            clock = Timeline(torch.device("cuda", 0))
            step(clock, host.sleep, work)
            reading = clock.cut()
            spans = reading.spans()
    run = Run("profile", tmp_path, 60.0, "cpu", 0, {}, RowFile(tmp_path / "accept.json").add)
    run.cuda = True
    done: Any = SimpleNamespace(spans=spans, seconds=reading.seconds)
    idle_beside(run, "a step", kernels, done)
    met = {row["check"]: row["floor_met"] for row in read_rows(tmp_path / "accept.json")}
    name = "megapar, a step: gpu_idle"
    assert met == {f"{name} above the profiler's": above, f"{name} below the profiler's": below}
