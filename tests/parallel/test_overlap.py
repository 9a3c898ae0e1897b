"""Communication: what overlaps, and that exposed_comm_s tells where time was lost.

By a clock that the tests move, and once more, in the slow tests, by the machine's.
"""

import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from statistics import median
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megapar.config.layout import Layout
from megapar.config.schema import TrainConfig
from megapar.launch.pool import PoolError, WorkerPool
from megapar.mesh import Mesh
from megapar.models.layer import TransformerLayer
from megapar.parallel import collectives
from megapar.parallel.grad_sync import GradSync
from megapar.schedule.simulate import simulate
from megapar.trace.spans import FLIGHT, Span
from megapar.train.metrics import gather_figures, local_figures, summarise
from megapar.train.trainer import Trainer
from tests.tiny import tiny_config
from tests.virtual_time import VirtualClock

DELAY_S = 0.05
LATE = [("tp", "tp2"), ("pp", "pp2"), ("dp", "dp2"), ("pp", "pp2dp2"), ("dp", "pp2dp2")]  # (axis, layout)


def first_bucket_and_last_backward(rank: int, world_size: int, config: TrainConfig) -> tuple[list[float], float]:
    trainer = Trainer(config, rank)
    assert len(trainer.buffers.buckets) > 2
    trainer.step(1)
    starts: list[float] = []
    original = GradSync._reduce

    def reduce(self: GradSync, bucket: Any) -> None:
        starts.append(time.perf_counter())
        original(self, bucket)

    with mock.patch.object(GradSync, "_reduce", reduce):
        spans = trainer.step(2).spans
    trainer.close()
    return starts, max(span.stop for span in spans if span.kind == "B")


@pytest.mark.parametrize("layout", ["dp2", "pp2dp2"])
def test_the_first_bucket_starts_before_the_last_backward_ends(layout: str, pool: WorkerPool, prefix: str) -> None:
    config = tiny_config(prefix, layout, **{"parallel.bucket_size": 500})
    for starts, end in pool.run(first_bucket_and_last_backward, 2 if layout == "dp2" else 4, config):
        assert starts[0] < end
        assert len(starts) > 2


def once_late(function: Callable) -> Callable:
    """`function`, its second call late by DELAY_S on rank 0: late where its time is counted, inside the call."""
    calls = 0

    def late(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2 and dist.get_rank() == 0:
            time.sleep(DELAY_S)
        return function(*args, **kwargs)

    return late


def late_bucket(trainer: Trainer) -> Any:
    """The last bucket's transfer takes DELAY_S longer in rank 0's dp group; the computation goes on meanwhile."""
    last = len(trainer.buffers.buckets) if 0 in trainer.mesh["dp"].ranks else None
    calls = 0

    class LateWork:
        def __init__(self, flat: torch.Tensor, group: Any) -> None:
            self.thread = threading.Thread(target=self.transfer, args=(flat, group))
            self.thread.start()

        def transfer(self, flat: torch.Tensor, group: Any) -> None:
            time.sleep(DELAY_S)
            real(flat, group=group)

        def wait(self) -> None:
            self.thread.join()

        def get_future(self) -> Any:
            return mock.Mock()

    def all_reduce(flat: torch.Tensor, group: Any, async_op: bool = False) -> Any:
        nonlocal calls
        calls += async_op
        return LateWork(flat, group) if async_op and calls == last else real(flat, group=group, async_op=async_op)

    real = dist.all_reduce
    return mock.patch.object(collectives.dist, "all_reduce", all_reduce)


INJECTIONS: dict[str, Callable[[Trainer], Any]] = {
    "pp": lambda trainer: mock.patch("megapar.pipeline.executor.dist.isend", once_late(dist.isend)),
    "tp": lambda trainer: mock.patch.object(collectives.dist, "all_reduce", once_late(dist.all_reduce)),
    "dp": late_bucket,
}


def exposed(rank: int, world_size: int, config: TrainConfig, axis: str) -> list[dict[str, float]]:
    """exposed_comm_s of alternating steps, without and with the injection."""
    trainer = Trainer(config, rank)
    rows = []
    for step in range(1, config.train.steps + 1):
        patch = INJECTIONS[axis](trainer) if step % 2 == 0 else mock.MagicMock()
        with patch:
            done = trainer.step(step)
        figures = gather_figures(local_figures(done.loss, done.spans), trainer.mesh)
        rows.append(summarise(figures)["exposed_comm_s"])
    trainer.close()
    return rows


@pytest.mark.slow
@pytest.mark.parametrize(("axis", "layout"), LATE)
def test_a_late_operation_shows_on_its_axis(axis: str, layout: str, pool: WorkerPool, prefix: str) -> None:
    """50 ms on one operation raise this axis' figure by 50 ms within 20%, and no other's. Medians: cores are shared.

    At most two ranks per core of a small machine: where more compete for it, 50 ms of one rank's sleep speed the others
    up, and the figure rises by less than was injected.
    """
    ranks = Layout.parse(layout)
    values = {"parallel.bucket_size": 3000, "train.steps": 21, "train.global_batch_size": 4 * ranks["dp"]}
    config = tiny_config(prefix, layout, **values)
    rows = pool.run(exposed, ranks.world, config, axis)[0][1:]  # the first step warms up
    late, usual = rows[0::2], rows[1::2]
    for name in ("tp", "pp", "dp"):
        change = median(row[name] for row in late) - median(row[name] for row in usual)
        assert change == pytest.approx(DELAY_S if name == axis else 0.0, abs=0.2 * DELAY_S), (name, rows)


# One operation late, by the virtual clock: the same as INJECTIONS.
VIRTUALLY_LATE: dict[str, Callable[[Trainer, VirtualClock], Any]] = {
    "pp": lambda trainer, clock: mock.patch.object(dist, "isend", once_late(dist.isend)),
    "tp": lambda trainer, clock: mock.patch.object(dist, "all_reduce", once_late(dist.all_reduce)),
    "dp": lambda trainer, clock: mock.patch.object(dist, "all_reduce", slow_last_bucket(trainer, clock)),
}


def slow_last_bucket(trainer: Trainer, clock: VirtualClock) -> Callable[..., Any]:
    """The last bucket's all-reduce is under way for DELAY_S in rank 0's dp group."""
    last = len(trainer.buffers.buckets) if 0 in trainer.mesh["dp"].ranks else None
    calls, plain = 0, dist.all_reduce

    def all_reduce(flat: torch.Tensor, group: Any, async_op: bool = False) -> Any:
        nonlocal calls
        calls += async_op
        with mock.patch.object(clock, "transfer", DELAY_S) if async_op and calls == last else nullcontext():
            return plain(flat, group=group, async_op=async_op)

    return all_reduce


def exposed_virtually(rank: int, world_size: int, config: TrainConfig, axis: str) -> list[dict[str, float]]:
    """exposed_comm_s of a step with the injection and of one without."""
    rows = []
    with VirtualClock().running() as clock:
        trainer = Trainer(config, rank)
        for step, patch in enumerate((VIRTUALLY_LATE[axis](trainer, clock), nullcontext()), start=1):
            with patch:
                done = trainer.step(step)
            rows.append(summarise(gather_figures(local_figures(done.loss, done.spans), trainer.mesh)))
        trainer.close()
    return [row["exposed_comm_s"] for row in rows]


@pytest.mark.parametrize(("axis", "layout"), LATE)
def test_exposed_time_is_that_of_the_late_operation(axis: str, layout: str, pool: WorkerPool, prefix: str) -> None:
    """Nothing else takes time: the figure is the delay on its axis and 0 on every other, as in a step without delay."""
    ranks = Layout.parse(layout)
    config = tiny_config(prefix, layout, **{"parallel.bucket_size": 3000, "train.global_batch_size": 4 * ranks["dp"]})
    late, usual = pool.run(exposed_virtually, ranks.world, config, axis)[0]
    nothing = {"tp": 0.0, "pp": 0.0, "dp": 0.0, "world": 0.0}
    assert usual == pytest.approx(nothing, abs=1e-9)
    assert late == pytest.approx(nothing | {axis: DELAY_S}, abs=1e-9)


def sleeping_layers(rank: int, world_size: int, config: TrainConfig, transfer_s: float) -> tuple[list[Span], float]:
    """The spans of a step, and its exposed dp time, where a layer's F and B take 5 and 10 s: B before its gradients."""
    plain = TransformerLayer.forward

    def slow(self: TransformerLayer, *inputs: Any) -> torch.Tensor:
        return Sleep.apply(plain(self, *inputs), 5.0, 10.0)

    with VirtualClock(transfer_s).running(), mock.patch.object(TransformerLayer, "forward", slow):
        trainer = Trainer(config, rank)
        trainer.mesh.timeline.detailed = True
        done = trainer.step(1)
        figures = gather_figures(local_figures(done.loss, done.spans), trainer.mesh)
        trainer.close()
    return done.spans, summarise(figures)["exposed_comm_s"]["dp"]


def test_reductions_hide_behind_the_backward(pool: WorkerPool, prefix: str) -> None:
    """The head's buckets start when the last backward does, a layer's 10 s later and the rest at its end after 20 s.
    Under way for 15 s, the first are hidden whole, and of the last nothing: 15 s in which all else arrives, too."""
    config = tiny_config(prefix, "dp2", **{"parallel.bucket_size": 500})
    for spans, exposed_s in pool.run(sleeping_layers, 2, config, 15.0):
        last = [span for span in spans if span.kind == "B"][-1]
        flights = {span.name: span for span in spans if span.kind == FLIGHT}
        assert {flight.start - last.start for flight in flights.values()} == {0.0, 10.0, 20.0}
        assert {flight.seconds for flight in flights.values()} == {15.0}
        waits = {span.name: span for span in spans if span.kind == "dp"}
        assert waits.keys() == flights.keys()
        for name, wait in waits.items():
            assert last.stop <= wait.start and wait.stop == max(wait.start, flights[name].stop)
            assert flights[name].start > last.start or wait.seconds == 0.0
        assert exposed_s == 15.0


def stuck_peer(rank: int, world_size: int) -> None:
    mesh = Mesh(Layout(dp=2, tp=2), rank, timeout=timedelta(seconds=2))
    if rank == 3:
        time.sleep(600)  # neither computing nor gone
    if rank == 2:
        collectives.all_reduce(torch.ones(4), mesh["tp"])


def test_a_stuck_rank_ends_the_run_and_the_operation_is_named(pool: WorkerPool) -> None:
    """The group's own timeout, not torch's default of half an hour, which new groups get. The pool's is two minutes,
    and would say something else."""
    with pytest.raises(PoolError, match="in all_reduce over tp of ranks 2, 3"):
        pool.run(stuck_peer, 4)


class Sleep(torch.autograd.Function):
    """A stage of known cost, and no core needed."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, forward: float, backward: float) -> torch.Tensor:
        time.sleep(forward)
        ctx.backward_s = backward
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        time.sleep(ctx.backward_s)
        return grad, None, None


def sleeping_trainer(config: TrainConfig, rank: int, forward_s: float, backward_s: float) -> Trainer:
    """One whose stages take this much longer, at their end."""
    trainer = Trainer(config, rank)
    stage: Any = next(iter(trainer.stages.values()))
    plain = stage.forward
    stage.forward = lambda *inputs: {name: Sleep.apply(x, forward_s, backward_s) for name, x in plain(*inputs).items()}
    return trainer


def bubble_of_sleeping_stages(
    rank: int, world_size: int, config: TrainConfig, forward_s: float, backward_s: float
) -> tuple[list[float], float]:
    """The bubble of three steps, and the ideal one."""
    trainer = sleeping_trainer(config, rank, forward_s, backward_s)
    measured = []
    for step in (1, 2, 3):
        done = trainer.step(step)
        measured.append(summarise(gather_figures(local_figures(done.loss, done.spans), trainer.mesh))["bubble"])
    ideal = simulate(trainer.schedule).mean_bubble
    trainer.close()
    return measured, ideal


def bubble_by_the_virtual_clock(rank: int, world_size: int, config: TrainConfig) -> tuple[list[float], float]:
    with VirtualClock().running():
        return bubble_of_sleeping_stages(rank, world_size, config, 1.0, 2.0)


@pytest.mark.parametrize("layout", ["pp2", "pp4"])
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_the_bubble_is_the_ideal_one_for_equal_stages(
    layout: str, schedule: str, pool: WorkerPool, prefix: str
) -> None:
    """Nothing but the stages takes time."""
    config = tiny_config(prefix, layout, **{"model.layers": 4, "pipeline.schedule": schedule})
    measured, ideal = pool.run(bubble_by_the_virtual_clock, int(layout[2:]), config)[0]
    assert measured == pytest.approx([ideal] * 3, abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["pp2", "pp4"])
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_the_measured_bubble_is_the_ideal_one_for_equal_stages(
    layout: str, schedule: str, pool: WorkerPool, prefix: str
) -> None:
    config = tiny_config(prefix, layout, **{"model.layers": 4, "pipeline.schedule": schedule})
    measured, ideal = pool.run(bubble_of_sleeping_stages, int(layout[2:]), config, 0.01, 0.02)[0]
    assert median(measured) == pytest.approx(ideal, abs=0.05)  # the stages' own small computation and the transfers
