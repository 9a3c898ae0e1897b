"""Initial values and shards: functions of the record and the rank alone."""

import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from megapar.config.layout import Layout
from megapar.launch.machine import keep_freed_memory
from megapar.parallel.initial import fill
from megapar.parallel.record import Constant, Copies, Normal, ParameterRecord, Shard, Split


def on(record: ParameterRecord, ranks: int, rank: int) -> Shard:
    """What a rank of one axis holds."""
    return record.shard(Layout(tp=ranks), {"pp": 0, "dp": 0, "tp": rank})


def shard_of(record: ParameterRecord, ranks: int, rank: int, seed: int = 7) -> torch.Tensor:
    shard = on(record, ranks, rank)
    out = torch.full(shard.shape, torch.nan, dtype=torch.float64)
    fill(record, shard, seed, out)
    return out


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", [(61, 24), (13, 1001), (700, 900)])
@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_the_union_of_shards_is_the_whole(dim: int, shape: tuple[int, int], ranks: int) -> None:
    record = ParameterRecord("w", shape, Normal(0.02), (Split("tp", dim),))
    union = torch.cat([shard_of(record, ranks, rank) for rank in range(ranks)], dim)
    assert torch.equal(union, shard_of(record, 1, 0))


def test_a_parameter_may_be_divided_by_two_axes() -> None:
    """An expert's matrix: experts over one axis, features over another. Every box has the whole tensor's values."""
    record = ParameterRecord("experts", (6, 4, 10), Normal(0.02), (Split("pp", 0), Split("tp", 2)))
    layout = Layout(pp=4, tp=3)
    whole = shard_of(record, 1, 0)
    boxes = []
    for rank in range(layout.world):
        shard = record.shard(layout, layout.coordinates(rank))
        out = torch.empty(shard.shape, dtype=torch.float64)
        fill(record, shard, 7, out)
        assert torch.equal(out, whole[shard.box])
        assert shard.unique and shard.counted
        boxes.append(shard.box)
    covered = torch.zeros(record.shape)
    for box in boxes:
        covered[box] += 1
    assert torch.equal(covered, torch.ones(record.shape))
    assert record.widest(layout) == 2 * 4 * 4


def test_replicated_heads_are_equal() -> None:
    record = ParameterRecord("k", (8, 6), Normal(0.02), (Split("tp", 0, 2),))
    parts = [shard_of(record, 4, rank) for rank in range(4)]
    assert torch.equal(parts[0], parts[1]) and torch.equal(parts[2], parts[3])
    assert torch.equal(torch.cat([parts[0], parts[2]]), shard_of(record, 1, 0))
    assert [on(record, 4, rank).copies["tp"] for rank in range(4)] == [Copies(2, 0), Copies(2, 1)] * 2


def test_values_depend_on_seed_and_name_and_are_normal() -> None:
    record = ParameterRecord("w", (400, 500), Normal(2.0), (Split("tp", 1),))
    values = shard_of(record, 1, 0)
    assert not torch.equal(values, shard_of(record, 1, 0, seed=8))
    assert not torch.equal(values, shard_of(ParameterRecord("v", (400, 500), Normal(2.0), (Split("tp", 1),)), 1, 0))
    # 200,000 draws: standard errors of mean, std, skewness and kurtosis are 0.002, 0.002, 0.005 and 0.011 sigma.
    z = values / 2.0
    for moment, expected in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)):
        assert z.pow(moment).mean().item() == pytest.approx(expected, abs=0.06), moment
    assert z.flatten()[:-1].mul(z.flatten()[1:]).mean().abs().item() < 0.01
    assert torch.equal(shard_of(ParameterRecord("c", (5,), Constant(1.0)), 2, 1), torch.ones(5).double())


HUGE = ParameterRecord("huge", (1 << 20, 1 << 20), Normal(0.02), (Split("tp", 1),))  # 2^40 elements
ONE_OF_MANY = on(HUGE, 1 << 18, 77_777)  # 2^22 of them, along the inner dim


def test_a_shard_of_a_huge_parameter_costs_only_itself() -> None:
    """In memory under 100 MB; in work a random word for each of its elements."""
    out = torch.empty(ONE_OF_MANY.shape)
    words, random = [], np.random.Philox

    class Counting(random):  # type: ignore[misc, valid-type]
        def random_raw(self, size: int) -> Any:
            words.append(size)
            return super().random_raw(size)

    tracemalloc.start()
    with mock.patch.object(np.random, "Philox", Counting):
        fill(HUGE, ONE_OF_MANY, 0, out)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(words) == out.numel() and len(words) <= out.numel() >> 15
    assert peak < 100e6
    assert out.std().item() == pytest.approx(0.02, rel=0.01)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_nothing(two_threads: None, dtype: torch.dtype) -> None:
    record = ParameterRecord("w", (3000, 1001), Normal(0.02), (Split("tp", 1),))
    shard = on(record, 2, 1)
    by_threads: list[torch.Tensor] = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        by_threads.append(torch.empty(shard.shape, dtype=dtype))
        with mock.patch("megapar.parallel.initial.ThreadPoolExecutor", wraps=ThreadPoolExecutor) as pool:
            fill(record, shard, 0, by_threads[-1])
        assert pool.call_count == threads - 1
    assert torch.equal(*by_threads)


@pytest.mark.slow
def test_seventy_million_values_in_four_seconds_and_half_of_it_with_two_threads(two_threads: None) -> None:
    """Medians of three: 2.0 and 1.1 s on an AMD EPYC. Two threads need two cores that nobody else uses: 0.7 times."""
    record = ParameterRecord("w", (7, 1000, 1000), Normal(0.02), (Split("tp", 0),))
    out, seconds = torch.empty(record.shape), {}
    keep_freed_memory()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            for seed in range(10):
                fill(record, on(record, 1, 0), seed, out)
            times.append(time.perf_counter() - start)
        seconds[threads] = median(times)
    assert seconds[1] < 4.0
    assert seconds[2] < 0.7 * seconds[1]


@pytest.mark.slow
def test_a_shard_of_a_huge_parameter_takes_under_a_second() -> None:
    out = torch.empty(ONE_OF_MANY.shape)
    start = time.perf_counter()
    fill(HUGE, ONE_OF_MANY, 0, out)
    assert time.perf_counter() - start < 1.0
