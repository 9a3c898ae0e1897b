"""Every schedule that there is: proven for many sizes, and as good as its paper says."""

import itertools

import pytest

from megapar.schedule.actions import COMPUTE, Action, Schedule
from megapar.schedule.build import build
from megapar.schedule.check import check
from megapar.schedule.costs import Costs
from megapar.schedule.lower import forward_only, lower
from megapar.schedule.simulate import simulate
from tests.schedule.tables import NAMES, chunks_of, sizes


def pair_transfers(schedule: Schedule) -> Schedule:
    """The same computation with its transfers where both ends come to them together: it runs with sends that wait.

    Every transfer passes when its F, B or I is done in a replay with equal costs, so that one order in time holds for
    all ranks. For backends and kernels without asynchronous sends; a receive may then stand before it is needed.
    """
    events: list[list[tuple[float, int, int, Action]]] = [[] for _ in schedule.rows]
    transfers: list[tuple[float, Action, Action]] = []
    for rank, spans in enumerate(simulate(schedule).spans):
        for start, end, action in spans:
            stage, kind, m = action
            events[rank].append((start, 1, len(events[rank]), action))
            step = {"F": 1, "W": 0}.get(kind, -1)
            peer = stage + step
            if step and 0 <= peer < schedule.stages and schedule.rank_of(peer) != rank:
                way = "F" if kind == "F" else "B"
                transfers.append((end, Action(stage, f"SEND_{way}", m), Action(peer, f"RECV_{way}", m)))
    for number, (time, send, receive) in enumerate(sorted(transfers)):
        # Before the computation that starts at the same time: that may need it.
        events[schedule.rank_of(send.stage)].append((time, 0, number, send))
        events[schedule.rank_of(receive.stage)].append((time, 0, number, receive))
    rows = [[action for *_, action in sorted(row)] for row in events]
    for row in rows:
        for stage in {action.stage for action in row}:
            last = max((at for at, a in enumerate(row) if a.stage == stage and a.kind in ("B", "W")), default=None)
            if last is not None:
                row.insert(last + 1, Action(stage, "REDUCE"))
    return Schedule(schedule.stages, schedule.microbatches, tuple(map(tuple, rows)))


V_SCHEDULES = ["zbv", "v_half", "v_min", "dualpipe_v"]


def prove(name: str, p: int, m: int, chunks: int) -> None:
    """Everything that holds for any schedule of any size."""
    schedule = build(name, p, m, chunks=chunks)
    assert (schedule.stages, schedule.microbatches, len(schedule.rows)) == (p * chunks, m, p)
    proof = check(schedule)
    assert [len(schedule.stages_of(rank)) for rank in range(p)] == [chunks] * p
    assert max(proof.in_flight) <= m * chunks
    evaluation = lower(forward_only(schedule.placement, m), schedule.stages, m)
    assert evaluation.placement == schedule.placement
    check(evaluation)
    paired = pair_transfers(schedule)
    assert check(paired, rendezvous=True).rendezvous is None
    assert list(map(sorted, paired.rows)) == list(map(sorted, schedule.rows))


@pytest.mark.parametrize("name", NAMES)
def test_every_schedule_is_proven(name: str) -> None:
    """Small sizes in full, where all the edges are, and some large ones."""
    every = 5 if name == "auto" else 1  # it tries 24 tables for each that it makes
    small = itertools.islice(sizes(name, range(1, 5), range(1, 10), most_chunks=2), 0, None, every)
    large = itertools.islice(sizes(name, range(5, 9), range(1, 33)), 0, None, 17 * every)
    tried = 0
    for p, m, chunks in itertools.chain(small, large):
        prove(name, p, m, chunks)
        tried += 1
    assert tried >= 20


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_schedule_is_proven_in_full(name: str) -> None:
    """All sizes up to 8 ranks, 32 micro-batches and 4 stages a rank; of `auto`'s every 13th."""
    every = 13 if name == "auto" else 1
    for p, m, chunks in itertools.islice(sizes(name, range(1, 9), range(1, 33)), 0, None, every):
        prove(name, p, m, chunks)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name != "auto"])
def test_a_large_schedule_takes_seconds(name: str) -> None:
    """64 ranks, 1024 micro-batches, up to 1.6 million actions: made, proven and replayed."""
    schedule = build(name, 64, 1024, chunks=chunks_of(name)[-1])
    check(schedule)
    assert simulate(schedule).step_time > 3 * 1024


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("p", "m"), [(1, 2), (2, 4), (4, 16), (3, 9), (8, 24)])
def test_closed_forms(name: str, p: int, m: int) -> None:
    """Step time beyond m * (F + I + W), with F = I = W = 1 a rank, as the docstrings of the generators have it."""
    for chunks in chunks_of(name):
        more = {
            "gpipe": 3 * (p - 1),
            "1f1b": 3 * (p - 1),
            "interleaved": 3 * (p - 1) / chunks,
            "zb_h1": p - 1,
            "zb_h2": p - 1,
            "zbv": (p - 1) / 2,
            "dualpipe_v": (p - 1) / 2,
        }.get(name)
        if more is None or (name == "interleaved" and m % p):
            continue
        simulation = simulate(build(name, p, m, chunks=chunks))
        assert simulation.step_time == pytest.approx(3 * m + more, abs=1e-9)  # rounding of a sum of thirds
        assert simulation.mean_bubble == pytest.approx(more / (3 * m + more), abs=1e-9)
        if name in ("gpipe", "1f1b"):
            assert simulation.mean_bubble == pytest.approx((p - 1) / (m + p - 1), abs=1e-9)


@pytest.mark.parametrize("costs", [(1.0, 1.2, 0.8), (1.0, 1.0, 0.5), (1.0, 2.0, 1.0), (1.0, 1.0, 1.0)])
@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 16), (8, 16), (5, 7)])
def test_zb_h1_has_a_bubble_of_f_plus_i_less_w(costs: tuple[float, float, float], p: int, m: int) -> None:
    F, I, W = costs  # noqa: E741 (the actions' names)
    of_stages = Costs.even(p, p, F=F, I=I, W=W)
    schedule = build("zb_h1", p, m, costs=of_stages)
    simulation = simulate(schedule, of_stages)
    assert simulation.step_time == pytest.approx(m * (F + I + W) + (p - 1) * (F + I - W), abs=1e-9)
    assert max(check(schedule).in_flight) == max(check(build("1f1b", p, m)).in_flight)


@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 16), (8, 16), (5, 11)])
def test_zb_h2_never_stands_still_with_twice_the_memory(p: int, m: int) -> None:
    schedule = build("zb_h2", p, m)
    assert max(simulate(schedule).own_bubble) == pytest.approx(0, abs=1e-9)
    assert check(schedule).in_flight == (2 * p - 1,) * p


@pytest.mark.parametrize("p", [2, 3, 4, 5, 6, 7, 8, 12, 16])
def test_v_schedules_hold_what_their_papers_say(p: int) -> None:
    """Memory in micro-batches' worth of a rank, and time beyond the work, for m = 4p and F = I = W."""
    one_f_one_b = simulate(build("1f1b", p, 4 * p))
    assert max(one_f_one_b.peak) == p
    bounds = {"zbv": (p, 0.5 * (p - 1)), "v_half": (p / 2 + 1, 1.5 * p), "v_min": (p / 3 + 1.5, 2 * p)}
    for name, (memory, more) in bounds.items():
        simulation = simulate(build(name, p, 4 * p))
        assert max(simulation.peak) <= min(p, memory) + 1e-9, name
        assert simulation.step_time <= 3 * 4 * p + more + 1e-9, name
        # The bubble is one of the ends, not of every micro-batch.
        longer = simulate(build(name, p, 8 * p))
        assert longer.step_time - simulation.step_time == pytest.approx(3 * 4 * p, abs=1e-9), name
    assert max(simulate(build("dualpipe_v", p, 4 * p)).peak) == p + 0.5


def test_1f1b_and_gpipe_hold_what_they_should() -> None:
    for p in range(1, 9):
        for m in (1, 3, 8, 32):
            assert check(build("gpipe", p, m)).in_flight == (m,) * p
            assert check(build("1f1b", p, m)).in_flight == tuple(min(p - rank, m) for rank in range(p))


def test_interleaved_groups_micro_batches() -> None:
    """Two ranks, two stages each, four micro-batches: the order of Narayanan et al. 2021, figure 4, with p = 2."""
    rows = build("interleaved", 2, 4, chunks=2).rows
    compute = [" ".join(str(action) for action in row if action.kind in COMPUTE) for row in rows]
    assert compute[0] == "0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1 2B2 2B3 0B2 0B3"
    assert compute[1] == "1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2 1B3"


@pytest.mark.parametrize("name", V_SCHEDULES)
def test_a_v_turns_without_a_transfer(name: str) -> None:
    schedule = build(name, 3, 6)
    assert schedule.placement == (0, 1, 2, 2, 1, 0)
    actions = [action for row in schedule.rows for action in row]
    assert not [a for a in actions if (a.stage, a.kind) in ((2, "SEND_F"), (3, "RECV_F"), (3, "SEND_B"), (2, "RECV_B"))]
    assert Action(1, "SEND_F", 0) in actions and Action(4, "SEND_B", 0) in actions
