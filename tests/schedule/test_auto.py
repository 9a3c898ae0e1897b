"""`auto`: never slower than a named schedule that fits, never above the limit."""

import time

import pytest

from megapar.schedule.actions import ScheduleError
from megapar.schedule.build import build, generators, hand_over, refusal, searched
from megapar.schedule.check import check
from megapar.schedule.costs import Costs
from megapar.schedule.generators import auto
from megapar.schedule.simulate import simulate

COSTS: dict[str, dict[str, float]] = {
    "even": {},
    "slow I": {"I": 2.0},
    "head": {"head": 0.4},
    "latency": {"latency": 0.2},
    "all": {"I": 1.2, "W": 0.8, "head": 0.3, "embedding": 0.1, "transfer": 0.1, "kept": 0.7},
}


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("kind", COSTS)
def test_auto_is_the_fastest_that_fits(kind: str, chunks: int) -> None:
    p, m = 4, 12
    costs = Costs.even(p, p * chunks, **COSTS[kind])  # type: ignore[arg-type]
    times = []
    for limit in (p / 2 + 1, p, 2 * p, float("inf")):
        schedule = build("auto", p, m, chunks=chunks, costs=costs, memory_limit=limit)
        check(schedule)
        simulation = simulate(schedule, costs)
        assert max(simulation.peak) <= limit + 1e-9
        for name in generators():
            if name != "auto" and refusal(name, p, m, chunks) is None:
                named = simulate(build(name, p, m, chunks=chunks, costs=costs), costs)
                if max(named.peak) <= limit:
                    assert simulation.step_time <= named.step_time + 1e-9, name
        times.append(simulation.step_time)
    assert times == sorted(times, reverse=True)  # more memory never costs time


@pytest.mark.parametrize(("p", "m", "chunks", "limit"), [(4, 131, 2, 99), (2, 200, 2, 2), (8, 160, 1, 6)])
def test_a_long_phase_is_chosen_by_a_short_one(
    p: int, m: int, chunks: int, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the result of looking at all candidates in full."""
    found = build("auto", p, m, chunks=chunks, memory_limit=limit)
    check(found)
    monkeypatch.setattr("megapar.schedule.build._searched", {})
    monkeypatch.setattr("megapar.schedule.generators.auto._shortened", lambda problem: problem)
    full = build("auto", p, m, chunks=chunks, memory_limit=limit)
    assert simulate(found).step_time == simulate(full).step_time and max(simulate(found).peak) <= limit + 1e-9


@pytest.mark.slow
def test_auto_takes_five_seconds_at_most_for_a_thousand_microbatches() -> None:
    begin = time.perf_counter()
    build("auto", 8, 1024, chunks=2)
    assert time.perf_counter() - begin < 5


def test_auto_is_built_once_and_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    first = build("auto", 2, 6, memory_limit=2)
    found = searched()
    monkeypatch.setattr("megapar.schedule.build._searched", {})
    monkeypatch.setattr(auto, "list_schedule", lambda *given: pytest.fail("searched again"))
    with pytest.raises(pytest.fail.Exception, match="searched again"):
        build("auto", 2, 6, memory_limit=2)
    hand_over(found)
    assert build("auto", 2, 6, memory_limit=2) == first


def test_auto_finds_what_no_named_schedule_has() -> None:
    """A slow I, and memory of 2p: the list scheduler saves half of ZB-V's bubble. Measured: 65.5 against 67."""
    costs = Costs.even(4, 8, I=2)
    auto = simulate(build("auto", 4, 16, chunks=2, costs=costs, memory_limit=8), costs)
    named = [n for n in generators() if n != "auto" and refusal(n, 4, 16, 2) is None]
    best = min(simulate(build(name, 4, 16, chunks=2, costs=costs), costs).step_time for name in named)
    assert best == pytest.approx(67.0) and auto.step_time == pytest.approx(65.5)


def test_a_limit_below_one_micro_batch_is_refused() -> None:
    with pytest.raises(ScheduleError, match=r"memory_limit=0\.5 can't hold one micro-batch"):
        build("auto", 4, 8, memory_limit=0.5)
    assert max(simulate(build("auto", 4, 8, memory_limit=1)).peak) == 1
