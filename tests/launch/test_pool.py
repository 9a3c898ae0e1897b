"""The pool of processes: results, groups, and that it stays usable after a failure, a death and a hang."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megapar.launch.pool import PoolError, WorkerPool, _run
from tests.launch import jobs


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with WorkerPool(4) as pool:
        pool.run(jobs.pids, 4)  # all are up: what follows may measure time
        yield pool


@pytest.mark.parametrize("world_size", [1, 2, 4, 3])
def test_results_by_rank(pool: WorkerPool, world_size: int) -> None:
    results = pool.run(jobs.add, world_size, torch.tensor([1.0, 2.0], dtype=torch.float64))
    total = sum(range(world_size))
    assert [rank for rank, _, _ in results] == list(range(world_size))
    for _, number, _ in results:
        assert number.tolist() == [world_size + total, 2 * world_size + total]
        assert number.dtype == torch.float64


def test_groups_do_not_outlive_a_job(pool: WorkerPool) -> None:
    for _ in range(2):
        assert pool.run(jobs.groups_left, 2) == [False, False]


def test_processes_are_kept(pool: WorkerPool) -> None:
    assert pool.run(jobs.pids, 4) == pool.run(jobs.pids, 4)


def test_no_collection_of_what_was_imported_falls_into_a_job(pool: WorkerPool) -> None:
    """It would stop a rank for some 100 ms, in whichever job it falls, and a test of times with it."""
    for looked_at, spared in pool.run(jobs.objects, 4):
        assert spared > 20 * looked_at


@pytest.mark.parametrize("culprit", [0, 2])
def test_the_culprit_comes_first(pool: WorkerPool, culprit: int) -> None:
    with pytest.raises(PoolError) as caught:
        pool.run(jobs.fails, 3, culprit, timeout=30)
    assert caught.value.rank == culprit
    assert isinstance(caught.value.error, KeyError)
    text = str(caught.value)
    assert text.startswith("Traceback") and text.index("the culprit's own words") < text.index(f"rank {culprit} of 3")
    assert pool.run(jobs.add, 4, torch.ones(1))[3][1].item() == 10.0


def test_a_death_is_named(pool: WorkerPool) -> None:
    with pytest.raises(PoolError, match=r"^rank 1: died with exit code 7") as caught:
        pool.run(jobs.dies, 3, timeout=30)
    assert (caught.value.rank, caught.value.error) == (1, None)
    assert len(pool.run(jobs.pids, 4)) == 4


def test_a_hang_is_ended_and_shown(pool: WorkerPool) -> None:
    with pytest.raises(PoolError) as caught:
        pool.run(jobs.hangs, 2, timeout=3)
    assert caught.value.rank == 1
    assert "not done after 3 s, still running: rank 1" in str(caught.value)
    assert "in sleep_here" in str(caught.value)
    assert len(pool.run(jobs.pids, 2)) == 2


def test_a_result_that_can_not_travel_is_an_error(pool: WorkerPool) -> None:
    with pytest.raises(PoolError, match="pickle"):
        pool.run(jobs.unpicklable, 1)


def test_more_ranks_than_processes(pool: WorkerPool) -> None:
    with pytest.raises(ValueError, match="the pool has 4"):
        pool.run(jobs.pids, 5)


def test_ranks_on_gpus_have_one_each_and_nccl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    called: list[Any] = []
    monkeypatch.setattr(torch.cuda, "set_device", called.append)
    monkeypatch.setattr(
        dist, "init_process_group", lambda backend, **options: called.append((backend, options["rank"]))
    )
    monkeypatch.setattr(dist, "barrier", lambda: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    for device in ("cuda", "cpu"):
        result = _run(lambda *given: given, 1, 2, ("x",), str(tmp_path / device), 9.0, device)
        assert result == (1, 2, "x")
    assert called == [1, ("nccl", 1), ("gloo", 1)]
