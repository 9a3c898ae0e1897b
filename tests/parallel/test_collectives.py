"""What is in flight keeps its memory: the allocator knows nothing of a stream that NCCL works on."""

import gc
from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from megapar.mesh import Axis
from megapar.parallel.collectives import (
    start_all_gather,
    start_all_gather_list,
    start_all_reduce,
    start_all_to_all,
    start_reduce_scatter,
)
from megapar.parallel.compression import Matrix, Waiting, reduction
from megapar.trace.clock import Timeline

RANKS, SIZE = 2, 1 << 12


class Flight:
    """Stands for `torch.distributed`: notes where the operands of a collective lie, and keeps none of them."""

    def __init__(self) -> None:
        self.memory: dict[int, StorageWeakRef] = {}

    def start(self, *operands: Tensor | list[Tensor], group: Any, async_op: bool = False) -> Any:
        tensors = [one for each in operands for one in (each if isinstance(each, list) else [each])]
        if async_op:
            self.memory |= {tensor.data_ptr(): StorageWeakRef(tensor.untyped_storage()) for tensor in tensors}
        return SimpleNamespace(wait=lambda: None, get_future=lambda: mock.Mock())


def axis() -> Axis:
    return Axis("dp", RANKS, 0, (0, 1), None, Timeline(torch.device("cpu")))


def fresh() -> Tensor:
    return torch.ones(SIZE)


STARTS: dict[str, Callable[[], Waiting]] = {
    "all_reduce": lambda: start_all_reduce("sum", fresh(), axis()),
    "all_gather": lambda: start_all_gather("gather", fresh(), fresh()[: SIZE // RANKS], axis()),
    "all_gather_list": lambda: start_all_gather_list("gather", [fresh(), fresh()], fresh(), axis()),
    "reduce_scatter": lambda: start_reduce_scatter("scatter", fresh()[: SIZE // RANKS], fresh(), axis()),
    "all_to_all": lambda: start_all_to_all("exchange", fresh(), fresh(), axis()),
    "bf16": lambda: compressed("bf16"),
    "int8_ef": lambda: compressed("int8_ef"),
    "powersgd": lambda: compressed("powersgd"),
}


def compressed(method: str) -> Waiting:
    matrix = Matrix(0, 32, SIZE // 64)  # half of the bucket, so that there is an exact part too
    flat = fresh()
    return reduction(method, axis(), [matrix], SIZE, 4).start("bucket", flat, flat)


@pytest.mark.parametrize("name", STARTS)
def test_operands_keep_their_memory_until_the_wait(name: str) -> None:
    """And tensors made meanwhile lie elsewhere."""
    flight = Flight()
    start: Any = flight.start
    names = ("all_reduce", "all_gather", "all_gather_single", "all_to_all_single")
    with ExitStack() as patches:
        for name_of_function in names:
            patches.enter_context(mock.patch.object(dist, name_of_function, start))
        started = STARTS[name]()
    gc.collect()
    later = [torch.empty(SIZE) for _ in range(20)]
    assert flight.memory
    assert not any(memory.expired() for memory in flight.memory.values())
    assert not {tensor.data_ptr() for tensor in later} & flight.memory.keys()
    del started
