"""What a GPU did in a call, by torch's profiler."""

import json
from collections.abc import Callable, Iterable

from torch.profiler import ProfilerActivity, profile

from experiments.gpu.run import Run
from megapar.trace.spans import IDLE, Span

Kernels = list[tuple[str, float, float]]  # name, begin and end in microseconds
CATEGORIES = {True: ("kernel", "gpu_memcpy", "gpu_memset"), False: ("cpu_op",)}  # on a card, in a rehearsal


def kernels_of(run: Run, call: Callable[[], object]) -> Kernels:
    """Everything that the GPU did in a call, in the order in which it began."""
    with profile(activities=[ProfilerActivity.CUDA if run.cuda else ProfilerActivity.CPU]) as profiler:
        call()
        run.sync()
    path = run.out / "work" / f"{run.section}.trace.json"
    profiler.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    wanted = [e for e in events if e.get("cat") in CATEGORIES[run.cuda] and "dur" in e]
    return sorted((e["name"], e["ts"], e["ts"] + e["dur"]) for e in wanted)


def busy_of(kernels: Kernels) -> tuple[float, float]:
    """(seconds in which at least one of them ran, seconds from the first to the last)"""
    runs = sorted((begin, end) for _, begin, end in kernels)
    total, reached = 0.0, runs[0][0]
    for begin, end in runs:
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total / 1e6, (reached - runs[0][0]) / 1e6


def idle_of(kernels: Kernels, spans: Iterable[Span], seconds: float) -> tuple[float, float]:
    """Idle shares of a step of so many seconds: by the profiler's kernels, and by the Trainer's clock."""
    own = sum(span.seconds for span in spans if span.kind == IDLE)
    return 1 - busy_of(kernels)[0] / seconds, own / seconds


def by_name(kernels: Kernels, most: int) -> list[tuple[str, float, int]]:
    """(name, milliseconds, how often) of those that took longest."""
    found: dict[str, tuple[float, int]] = {}
    for name, begin, end in kernels:
        total, count = found.get(name, (0.0, 0))
        found[name] = total + end - begin, count + 1
    ordered = sorted(found.items(), key=lambda item: -item[1][0])
    return [(name, total / 1e3, count) for name, (total, count) in ordered[:most]]
