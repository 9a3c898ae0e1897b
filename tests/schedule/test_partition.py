"""Partitions of layers over stages: pure arithmetic."""

from itertools import combinations, pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapar.schedule.partition import PartitionError, balanced, ranges, uniform


def test_partitions_cover_the_layers_once() -> None:
    for layers in range(1, 20):
        for stages in range(1, layers + 1):
            parts = ranges(uniform(layers, stages))
            assert [layer for part in parts for layer in part] == list(range(layers))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
            assert len(parts[-1]) == min(map(len, parts))
    assert ranges([5, 3]) == [range(5), range(5, 8)]


def slowest(counts: list[int], costs: list[float], embedding: float, head: float, speed: list[float]) -> float:
    parts = ranges(counts)
    times = [sum(costs[layer] for layer in part) for part in parts]
    times[0] += embedding
    times[-1] += head
    return max(time / of_device for time, of_device in zip(times, speed, strict=True))


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """Small whole numbers, so that sums are exact and equals are equal."""
    stages = draw(st.integers(1, 4))
    layers = draw(st.integers(stages, 7))
    numbers = st.integers(0, 6)
    return {
        "costs": draw(st.lists(numbers, min_size=layers, max_size=layers)),
        "stages": stages,
        "embedding": draw(numbers),
        "head": draw(numbers),
        "speed": draw(st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=stages, max_size=stages)),
        "memory": draw(st.lists(st.integers(1, 4), min_size=layers, max_size=layers)),
        "memory_limit": draw(st.lists(st.integers(1, 20), min_size=stages, max_size=stages)),
        "embedding_memory": draw(st.integers(0, 3)),
        "head_memory": draw(st.integers(0, 3)),
    }


@settings(deadline=None)  # the machine may be busy
@given(problems())
def test_balanced_is_the_best_of_all(problem: dict[str, Any]) -> None:
    """Brute force over every partition that keeps the limits."""
    stages, costs = problem["stages"], problem["costs"]
    layers = len(costs)
    possible = []
    for cuts in combinations(range(1, layers), stages - 1):
        ends = [0, *cuts, layers]
        counts = [end - start for start, end in pairwise(ends)]
        held = [sum(problem["memory"][start:end]) for start, end in pairwise(ends)]
        held[0] += problem["embedding_memory"]
        held[-1] += problem["head_memory"]
        if all(used <= limit for used, limit in zip(held, problem["memory_limit"], strict=True)):
            time = slowest(counts, costs, problem["embedding"], problem["head"], problem["speed"])
            possible.append((time, counts))
    if not possible:
        with pytest.raises(PartitionError, match=r"need .* of memory"):
            balanced(**problem)
        return
    found = balanced(**problem)
    assert found in [counts for _, counts in possible]
    time = slowest(found, costs, problem["embedding"], problem["head"], problem["speed"])
    assert time == min(time for time, _ in possible)


def test_a_heavy_head_and_a_slow_device_get_fewer_layers() -> None:
    assert balanced([1.0] * 12, 4) == [3, 3, 3, 3]
    assert balanced([1.0] * 12, 4, head=2.0) == [4, 4, 3, 1]
    assert balanced([1.0] * 14, 4, head=2.0) == [4, 4, 4, 2]
    assert balanced([1.0] * 14, 4, embedding=2.0) == [2, 4, 4, 4]
    assert balanced([1.0] * 12, 3, speed=[1.0, 0.5, 1.5]) == [4, 2, 6]
    assert balanced([1.0] * 12, 3, memory=[1.0] * 12, memory_limit=[2, 9, 9])[0] == 2


def test_what_can_not_be_is_refused() -> None:
    with pytest.raises(PartitionError, match="3 layers can't fill 4 stages"):
        balanced([1.0] * 3, 4)
    with pytest.raises(PartitionError, match="12 layers need 12 of memory and the devices have 9"):
        balanced([1.0] * 12, 3, memory=[1.0] * 12, memory_limit=[3, 3, 3])
    with pytest.raises(PartitionError, match="whole layers in order don't fit"):
        balanced([1.0] * 2, 2, memory=[1.0, 3.0], memory_limit=[3, 2])


def test_a_hundred_layers_take_a_moment() -> None:
    """A model of 128 layers over 64 stages."""
    assert balanced([1.0] * 128, 64) == [2] * 64
