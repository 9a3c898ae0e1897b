"""The collectives of one rank, through the code that starts and times them (gloo's in a rehearsal)."""

import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from experiments.gpu.compare import BOUNDS, distance
from experiments.gpu.run import Run
from experiments.gpu.section import Section
from megapar.mesh import Axis
from megapar.parallel import collectives, compression
from megapar.trace.clock import Timeline
from megapar.trace.spans import FLIGHT

# What megapar calls, by its names of torch 2.13 and by those before. One of each pair must be there.
NAMES = (("all_gather_single", "all_gather_into_tensor"), ("reduce_scatter_single", "reduce_scatter_tensor"))


def nccl(run: Run) -> None:
    if run.cuda:
        torch.cuda.set_device(0)  # card-only
    method = f"file://{run.out}/work/nccl.store"
    dist.init_process_group("nccl" if run.cuda else "gloo", init_method=method, rank=0, world_size=1)
    timeline = Timeline(torch.device(run.device))
    axis = Axis("dp", 1, 0, (0,), dist.group.WORLD, timeline)
    size = (1 << 20) if run.cuda else 64
    starts: dict[str, Callable[[Tensor, Tensor], Any]] = {
        "all_reduce": lambda x, into: collectives.start_all_reduce("a", into.copy_(x), axis),
        "all_gather": lambda x, into: collectives.start_all_gather("g", into, x, axis),
        "all_to_all": lambda x, into: collectives.start_all_to_all("t", into, x, axis),
        "reduce_scatter": lambda x, into: collectives.start_reduce_scatter("s", into, x, axis),
    }
    for name, start in starts.items():
        run.attempt(name, collective, run, name, start, size)
    run.attempt("one tensor", into_one, run, size)
    run.attempt("spans", ordered, run, timeline)
    run.attempt("a message in flight", kept_alive, run, axis, size)
    dist.destroy_process_group()


def collective(run: Run, name: str, start: Callable[[Tensor, Tensor], Any], size: int) -> None:
    x, into = run.randn(size), torch.full((size,), math.nan, device=run.device)
    start(x, into).wait()
    run.sync()
    run.row(name, torch.equal(into, x))


def into_one(run: Run, size: int) -> None:
    """What a rank of more than one calls, which an axis of one does not reach."""
    for new, old in NAMES:
        call = getattr(dist, new, None) or getattr(dist, old)
        x, into = run.randn(size), torch.full((size,), math.nan, device=run.device)
        call(into, x, group=dist.group.WORLD)
        run.sync()
        run.row(new.replace("_single", " into one tensor"), torch.equal(x, into), note=call.__name__)


def ordered(run: Run, timeline: Timeline) -> None:
    spans = timeline.take()
    right = bool(spans) and all(span.start <= span.stop for span in spans)
    run.row("spans begin before they end", right, len(spans), "spans")


def kept_alive(run: Run, axis: Axis, size: int) -> None:
    """Whether memory that a collective in flight still reads is given to somebody else."""
    addresses, start = list[int](), compression.start_all_to_all

    def watched(name: str, into: Tensor, x: Tensor, over: Axis) -> Any:
        addresses.extend((x.data_ptr(), x.numel() * x.element_size()))
        return start(name, into, x, over)

    axis.timeline.detailed = True  # an observer waits for the message, and NCCL then lets go of it
    matrix = compression.Matrix(0, size // 64, 64)
    coded = compression.Coded(compression.Bf16, axis, [matrix], size)
    flat = run.randn(size)
    kept = flat.clone()
    with mock.patch.object(compression, "start_all_to_all", watched):
        waiting = coded.start("c", flat, flat)
    address, length = addresses
    fresh = [torch.empty(length, dtype=torch.uint8, device=run.device) for _ in range(4)]
    reused = any(x.data_ptr() == address for x in fresh)
    run.row("a message in flight keeps its memory", not reused or not run.cuda, note="given to a new tensor" * reused)
    waiting.wait()
    flights = [span for span in axis.timeline.take() if span.kind == FLIGHT]
    run.row("a message is seen in flight", bool(flights) and all(span.seconds >= 0 for span in flights))
    axis.timeline.detailed = False
    run.within("bf16 reduction of one rank", distance(flat, kept.double()), BOUNDS["bf16"][0])


SECTION = Section("nccl", wave=6, seconds=40, run=nccl)
