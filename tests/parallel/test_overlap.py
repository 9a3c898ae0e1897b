"""Communication: what overlaps, and that exposed_comm_s tells where time was lost."""

import threading
import time
from collections.abc import Callable
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
from megapar.parallel import collectives
from megapar.parallel.grad_sync import GradSync
from megapar.schedule.simulate import simulate
from megapar.train.metrics import gather_figures, local_figures, summarise
from megapar.train.trainer import Trainer
from tests.tiny import tiny_config

DELAY_S = 0.05


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
    for step in range(1, 22):
        patch = INJECTIONS[axis](trainer) if step % 2 == 0 else mock.MagicMock()
        with patch:
            done = trainer.step(step)
        figures = gather_figures(local_figures(done.loss, done.spans), trainer.mesh)
        rows.append(summarise(figures)["exposed_comm_s"])
    trainer.close()
    return rows


@pytest.mark.parametrize(
    ("axis", "layout"),
    [("tp", "tp2"), ("pp", "pp2"), ("dp", "dp2"), ("pp", "pp2dp2"), ("dp", "pp2dp2")],
)
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


def stuck_peer(rank: int, world_size: int) -> None:
    mesh = Mesh(Layout(dp=2, tp=2), rank, timeout=timedelta(seconds=1))
    if rank == 3:
        time.sleep(4)  # neither computing nor gone
    collectives.all_reduce(torch.ones(4), mesh["tp"])


def test_a_stuck_rank_ends_the_run_and_the_operation_is_named(pool: WorkerPool) -> None:
    """The group's own timeout, not torch's default of half an hour, which new groups get."""
    start = time.perf_counter()
    with pytest.raises(PoolError, match="in all_reduce over tp of ranks 2, 3"):
        pool.run(stuck_peer, 4)
    assert time.perf_counter() - start < 10


class Sleep(torch.autograd.Function):
    """A stage of known cost: 10 ms forward, 20 ms backward, and no core needed."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.01)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        return grad


def bubble_of_sleeping_stages(rank: int, world_size: int, config: TrainConfig) -> tuple[float, float]:
    trainer = Trainer(config, rank)
    stage: Any = next(iter(trainer.stages.values()))
    forward = stage.forward
    stage.forward = lambda *inputs: {name: Sleep.apply(x) for name, x in forward(*inputs).items()}
    measured = []
    for step in (1, 2, 3):
        done = trainer.step(step)
        measured.append(summarise(gather_figures(local_figures(done.loss, done.spans), trainer.mesh))["bubble"])
    ideal = simulate(trainer.schedule).mean_bubble
    trainer.close()
    return median(measured), ideal


@pytest.mark.parametrize("layout", ["pp2", "pp4"])
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_the_measured_bubble_is_the_ideal_one_for_equal_stages(
    layout: str, schedule: str, pool: WorkerPool, prefix: str
) -> None:
    config = tiny_config(prefix, layout, **{"model.layers": 4, "pipeline.schedule": schedule})
    measured, ideal = pool.run(bubble_of_sleeping_stages, int(layout[2:]), config)[0]
    assert measured == pytest.approx(ideal, abs=0.05)  # the stages' own small computation and the transfers
