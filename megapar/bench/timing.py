"""How long a call takes and how much memory, on a GPU or on a CPU."""

import timeit
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

QUANTILES = (0.5, 0.2, 0.8)
FEWEST = 3  # samples of a call on a CPU


@dataclass(frozen=True)
class Quantiles:
    """Median, and what a fifth and four fifths of the samples stay below."""

    p50: float
    p20: float
    p80: float

    def rate(self, amount: float) -> "Quantiles":
        """Amount by time, if these are times: what is slow is a low rate."""
        return Quantiles(amount / self.p50, amount / self.p80, amount / self.p20)


def time_ms(call: Callable[[], Any], device: str, seconds: float) -> Quantiles:
    """Milliseconds of one call, from `seconds` of repetitions behind a warm-up.

    On a GPU by Triton's do_bench, which empties the L2 cache before each. On a CPU by torch's timer, with all threads
    of this process and caches as they are; a call of microseconds is timed in blocks, a long one three times.
    """
    if device == "cuda":
        from triton.testing import do_bench

        return Quantiles(*do_bench(call, warmup=250 * seconds, rep=1000 * seconds, quantiles=list(QUANTILES)))
    from torch.utils.benchmark import Timer

    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    times = list(timer.blocked_autorange(min_run_time=seconds).times)
    times += timeit.repeat(call, number=1, repeat=max(0, FEWEST - len(times)))
    samples = 1e3 * torch.tensor(times, dtype=torch.float64)
    return Quantiles(*torch.quantile(samples, torch.tensor(QUANTILES, dtype=torch.float64)).tolist())


def peak_mb(call: Callable[[], Any], device: str) -> float:
    """The most memory, in MB of 10^6 bytes, that one call holds beside what was there: results and temporaries.

    On a CPU what torch allocates; scratch space of the libraries below torch is not seen.
    """
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()  # and its results are freed inside: torch knows the size of what it frees only from here
    results = profiler.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 1e6
