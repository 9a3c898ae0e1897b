"""Partitions of layers over stages: pure arithmetic."""

from itertools import accumulate, combinations, pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapar.schedule.partition import PartitionError, balanced, uniform


def test_uniform_is_as_even_as_can_be() -> None:
    for layers in range(1, 20):
        for stages in range(1, layers + 1):
            counts = uniform(layers, stages)
            assert sum(counts) == layers and len(counts) == stages
            assert max(counts) - min(counts) <= 1
            assert counts[-1] == min(counts)


def slowest(counts: list[int], costs: list[float], speed: list[float]) -> float:
    ends = [0, *accumulate(counts)]
    times = [sum(costs[start:end]) for start, end in pairwise(ends)]
    return max(time / of_device for time, of_device in zip(times, speed, strict=True))


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """Small whole numbers, so that sums are exact and equals are equal."""
    stages = draw(st.integers(1, 4))
    parts = draw(st.integers(stages, 7))
    memory = st.lists(st.integers(1, 4), min_size=parts, max_size=parts)
    return {
        "costs": draw(st.lists(st.integers(0, 6), min_size=parts, max_size=parts)),
        "stages": stages,
        "speed": draw(st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=stages, max_size=stages)),
        "memory": draw(st.lists(memory, min_size=stages, max_size=stages)),
        "memory_limit": draw(st.lists(st.integers(1, 20), min_size=stages, max_size=stages)),
    }


@settings(deadline=None)  # the machine may be busy
@given(problems())
def test_balanced_is_the_best_of_all(problem: dict[str, Any]) -> None:
    """Brute force over every partition that keeps the limits."""
    stages, costs = problem["stages"], problem["costs"]
    parts = len(costs)
    possible = []
    for cuts in combinations(range(1, parts), stages - 1):
        ends = [0, *cuts, parts]
        counts = [end - start for start, end in pairwise(ends)]
        held = [sum(memory[start:end]) for memory, (start, end) in zip(problem["memory"], pairwise(ends), strict=True)]
        if all(used <= limit for used, limit in zip(held, problem["memory_limit"], strict=True)):
            possible.append((slowest(counts, costs, problem["speed"]), counts))
    if not possible:
        with pytest.raises(PartitionError, match=r"need .* of memory"):
            balanced(**problem)
        return
    found = balanced(**problem)
    assert found in [counts for _, counts in possible]
    assert slowest(found, costs, problem["speed"]) == min(time for time, _ in possible)


def test_a_heavy_head_and_a_slow_device_get_fewer_layers() -> None:
    assert balanced([1.0] * 12, 4) == [3, 3, 3, 3]
    assert balanced([*[1.0] * 12, 2.0], 4) == [4, 4, 4, 1]  # the head alone
    assert balanced([*[1.0] * 14, 2.0], 4) == [4, 4, 4, 3]
    assert balanced([*[1.0] * 8, 4.0], 3) == [4, 4, 1]  # the head alone
    assert balanced([2.0, *[1.0] * 14], 4) == [3, 4, 4, 4]
    assert balanced([1.0] * 12, 3, speed=[1.0, 0.5, 1.5]) == [4, 2, 6]
    assert balanced([1.0] * 12, 3, memory=[[1.0] * 12] * 3, memory_limit=[2, 9, 9])[0] == 2
    assert balanced([1.0] * 4, 2, memory=[[3.0] * 4, [1.0] * 4], memory_limit=[4, 4]) == [1, 3]


def test_what_can_not_be_is_refused() -> None:
    with pytest.raises(PartitionError, match="3 parts can't fill 4 stages"):
        balanced([1.0] * 3, 4)
    with pytest.raises(PartitionError, match="12 parts need 12 of memory and the devices have 9"):
        balanced([1.0] * 12, 3, memory=[[1.0] * 12] * 3, memory_limit=[3, 3, 3])
    with pytest.raises(PartitionError, match="whole parts in order don't fit"):
        balanced([1.0] * 2, 2, memory=[[1.0, 3.0]] * 2, memory_limit=[3, 2])


def test_a_hundred_layers_take_a_moment() -> None:
    """A model of 128 layers over 64 stages."""
    assert balanced([1.0] * 128, 64) == [2] * 64
