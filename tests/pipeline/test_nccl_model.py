"""Every schedule gets through on a model of NCCL, with the calls that the executor and the mesh really make.

And doesn't with fewer groups, or without connecting first: a model that nothing fails on would say nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from megapar.config.layout import Layout
from megapar.launch.pool import WorkerPool
from megapar.mesh import CHANNELS, Axis, Mesh, _connects_late
from megapar.parallel.weight_grad import WeightGrads
from megapar.pipeline.executor import Batch, Executor, Tensors, _Phase
from megapar.pipeline.graphs import Graphs
from megapar.pipeline.stage import TensorSpec
from megapar.schedule.actions import Schedule
from megapar.schedule.build import build, default_chunks, generators
from megapar.schedule.lower import forward_only, lower
from tests.pipeline.nccl_model import Call, Simulation, calls_of
from tests.pipeline.recorded_graph import RecordedGraph
from tests.pipeline.test_executor import MICROBATCHES, CrossStage, batches, loss_of, reference

SIZES = (2, 4, 8)
# Both ranks of some pair send each other the same kind: over one group a receive is ahead of the send behind it.
BOTH_WAYS = {("interleaved", 2), *((name, size) for name in ("zbv", "v_half", "v_min", "dualpipe_v") for size in SIZES)}


class Small(nn.Module):
    """A stage whose values mean nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def received(self, batch: Batch) -> dict[str, TensorSpec]:
        return {"x": TensorSpec((1,), torch.float32)}

    sent = received

    def forward(self, received: Tensors, batch: Batch) -> Tensors:
        return {"x": received.get("x", batch["x"]) * self.weight}


def small_loss(outputs: Tensors, batch: Batch) -> Tensor:
    return outputs["x"].sum()


def run_small(schedule: Schedule, mesh: Mesh, graphs: bool = False) -> None:
    stages = {stage: Small() for stage in schedule.stages_of(mesh["pp"].index)}
    inputs = [{"x": torch.ones(1)}] * schedule.microbatches
    weight_grads = WeightGrads()
    executor = Executor(stages, mesh, weight_grads, small_loss)
    if graphs:
        executor.graphs = Graphs(weight_grads, mesh.timeline, lambda: mesh, SynchronisingGraph)
    for _ in range(2):
        executor.run(schedule, inputs)


class SynchronisingGraph(RecordedGraph):
    """As `torch.cuda.graph`: a capture begins with a wait for the device. mesh: whose calls it is among."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self.mesh = mesh

    @contextmanager
    def capture(self) -> Iterator[None]:
        self.mesh._synchronize()
        with super().capture():
            yield


@cache
def schedule_of(name: str, size: int) -> Schedule:
    if name == "forward":
        return lower(forward_only(list(range(size)), 2 * size), size, 2 * size)
    return build(name, size, 2 * size, chunks=default_chunks(name))


def steps_of(name: str, size: int, backend: str = "nccl", graphs: bool = False) -> list[list[Call]]:
    """What each pipeline rank calls from the making of its mesh to the end of its second step."""
    schedule = schedule_of(name, size)
    return calls_of(size, lambda rank: run_small(schedule, Mesh(Layout(pp=size), rank), graphs), backend)


NAMES = [*sorted(generators()), "forward"]


@pytest.mark.parametrize("ahead", [1, 2])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_every_schedule_gets_through(name: str, size: int, ahead: int) -> None:
    with mock.patch.dict("megapar.pipeline.executor._POST_AHEAD", cpu=ahead):
        assert Simulation(steps_of(name, size)).stuck() == []


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", sorted(generators()))
def test_graphs_are_captured_where_nothing_waits_for_others(name: str, size: int) -> None:
    calls = steps_of(name, size, graphs=True)
    syncs = [sum(call.kind == "sync" for call in of_rank) for of_rank in calls]
    assert min(syncs) > 2, "captures, besides the sync of connecting"
    assert Simulation(calls).stuck() == []


def test_graphs_captured_behind_receives_are_not() -> None:
    """The device, that the host waits for, waits for a send behind it."""
    capture = _Phase.capture_graphs

    def behind(phase: _Phase) -> None:
        phase.post_receives()
        capture(phase)

    with mock.patch.object(_Phase, "capture_graphs", behind):
        assert Simulation(steps_of("1f1b", 2, graphs=True)).stuck()


def test_gpus_connect_whatever_the_default_group_is_called() -> None:
    for name in ("nccl", "undefined", "cpu:gloo,cuda:nccl"):
        with mock.patch.object(torch.distributed, "get_backend", lambda name=name: name):
            assert _connects_late(torch.device("cuda"))


def test_figures_of_the_hosts_have_a_group_of_their_own() -> None:
    """gloo, beside NCCL's groups; where those are gloo's it is the world."""
    found: list[Any] = []
    for backend in ("nccl", "gloo"):
        calls_of(2, lambda rank: found.append(Mesh(Layout(pp=2), rank).hosts), backend)
    assert [group[0] != "world" for group in found] == [True, True, False, False]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_groups_by_kind_alone_do_not(name: str, size: int) -> None:
    """With every communicator ready: what hangs is the order in the queues. A schedule that sends one way is fine."""

    def by_kind(mesh: Mesh, kind: str, source: int, target: int) -> Axis:
        return mesh[{"F": "pp", "B": "pp B down"}[kind]]

    with mock.patch.object(Mesh, "channel", by_kind):
        stuck = Simulation(steps_of(name, size, backend="gloo"), connected=True).stuck()
    assert bool(stuck) == ((name, size) in BOTH_WAYS)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", sorted(generators()))
def test_without_connecting_first_no_schedule_gets_through(name: str, size: int) -> None:
    """Rank 0 begins with a receive of a gradient, rank 1 with one of an activation: both hosts wait."""
    stuck = Simulation(steps_of(name, size, backend="gloo")).stuck()
    assert any("the host of rank 0 by" in line for line in stuck), stuck


@pytest.mark.parametrize("order", ["by rank", "reversed on odd ranks"])
def test_the_order_of_connecting_is_what_gets_through(order: str) -> None:
    """Any order that is the same on all ranks; with another one on every second rank they wait for each other."""

    def run(rank: int) -> None:
        mesh = Mesh(Layout(pp=4), rank)
        keys = sorted(schedule_of("interleaved", 4).transfers)
        sign = -1 if rank % 2 and order == "reversed on odd ranks" else 1
        with mock.patch("megapar.mesh._order_of_connecting", lambda transfer: sign * keys.index(transfer)):
            mesh.connect(keys)

    assert bool(Simulation(calls_of(4, run)).stuck()) == (order == "reversed on odd ranks")


def test_other_axes_connect_when_they_are_made() -> None:
    """dp, tp, blocks of tp, ties: each is used first where all its ranks are, and later in any order."""
    layout = Layout(tp=2, pp=2, dp=2)

    def run(rank: int) -> None:
        mesh = Mesh(layout, rank)
        run_small(schedule_of("interleaved", 2), mesh)
        axes = [mesh["dp"], mesh["tp"], mesh.among([0, 1]), mesh["world"]]
        for axis in axes if rank % 2 else reversed(axes):
            torch.distributed.all_reduce(torch.ones(1), group=axis.group)  # started, and waited for at the end

    def unmet(programs: list[list[Call]]) -> list[list[Call]]:
        """The collectives of the last lines alone, which wait for nothing on the host."""
        return [[call for call in calls if call.kind == "start"] for calls in programs]

    programs = calls_of(layout.world, run)
    assert Simulation(unmet(programs)).stuck() == []
    with mock.patch("megapar.mesh._connects_late", lambda device: False):
        assert Simulation(unmet(calls_of(layout.world, run))).stuck()


def test_a_rank_is_connected_once() -> None:
    def run(rank: int) -> None:
        mesh = Mesh(Layout(pp=2), rank)
        for _ in range(2):
            mesh.connect(schedule_of("interleaved", 2).transfers)

    starts = [str(call.operation) for call in calls_of(2, run)[0] if call.kind == "start"]
    assert len(starts) == len(set(starts)) == 1 + len(CHANNELS)  # the group's own, then each channel


def test_a_host_waits_for_each_connection_before_the_next() -> None:
    """A wait for a message holds up the device alone: the next pair's first use would meet it there."""
    calls = calls_of(4, lambda rank: Mesh(Layout(pp=4), rank).connect(schedule_of("interleaved", 4).transfers))
    for of_rank in calls:
        assert [call.kind for call in of_rank] == ["start", "wait", "sync"] * (len(of_rank) // 3)
        assert len(of_rank) > 3  # more than the group's own


def test_it_waits_for_the_device_that_it_is_on() -> None:
    mesh, device = Mesh(), torch.device("cuda", 1)
    with mock.patch.object(torch.cuda, "synchronize") as synchronize:
        mesh._synchronize()
        assert synchronize.mock_calls == []
        mesh.device = device
        mesh._synchronize()
        assert synchronize.mock_calls == [mock.call(device)]


def run_connected(rank: int, world_size: int, name: str) -> tuple[list[Tensor], int]:
    """A step on gloo as if it connected late. Returns the losses, and how many messages made the connections."""
    schedule, messages = build(name, world_size, MICROBATCHES), 0
    tokens = Mesh._token

    def counted(mesh: Mesh) -> Tensor:
        nonlocal messages
        messages += 1
        return tokens(mesh)

    with mock.patch("megapar.mesh._connects_late", lambda device: True), mock.patch.object(Mesh, "_token", counted):
        mesh = Mesh(Layout(pp=world_size), rank)
        stages = {stage: CrossStage(stage, schedule.stages) for stage in schedule.stages_of(rank)}
        losses = Executor(stages, mesh, WeightGrads(), loss_of).run(schedule, batches())
        mesh.close()
    return losses, messages


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zbv"])
def test_connecting_is_over_before_the_step(name: str, pool: WorkerPool) -> None:
    """Real transfers: none of the tokens that connect is taken for a message of the step."""
    expected = [float(loss) for loss in reference(2 * default_chunks(name))[0]]
    results = pool.run(run_connected, 2, name)
    losses = next(losses for losses, _ in results if losses)
    assert [float(loss) for loss in losses] == pytest.approx(expected, rel=1e-12)
    assert all(messages > 2 for _, messages in results)
