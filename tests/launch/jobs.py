"""Jobs for the pool's tests: at the top level of a module, as they travel by pickle."""

import gc
import os
import time
from typing import Any


def add(rank: int, world_size: int, number: Any) -> tuple[int, Any, int]:
    import torch.distributed as dist

    number = number + rank
    if world_size > 1:
        dist.all_reduce(number)
    else:
        assert not dist.is_initialized()
    return rank, number, os.getpid()


def groups_left(rank: int, world_size: int) -> bool:
    """Make a group of one's own and leave it behind; was one there from before?"""
    import torch.distributed as dist

    before = len(dist.distributed_c10d._world.pg_map)
    dist.new_group([0, 1])
    return before > 1


def fails(rank: int, world_size: int, culprit: int) -> None:
    import torch
    import torch.distributed as dist

    if rank == culprit:
        raise KeyError("the culprit's own words")
    dist.all_reduce(torch.ones(1))


def dies(rank: int, world_size: int) -> None:
    import torch
    import torch.distributed as dist

    if rank == 1:
        os._exit(7)
    dist.all_reduce(torch.ones(1))


def hangs(rank: int, world_size: int) -> None:
    if rank == 1:
        sleep_here()


def sleep_here() -> None:
    time.sleep(600)


def unpicklable(rank: int, world_size: int) -> Any:
    return lambda: rank


def pids(rank: int, world_size: int) -> int:
    return os.getpid()


def objects(rank: int, world_size: int) -> tuple[int, int]:
    """How many objects a garbage collection would look at, and how many it is spared."""
    return len(gc.get_objects()), gc.get_freeze_count()
