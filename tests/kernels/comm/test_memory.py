"""Memory of a use: on GPUs that can't reach each other, and what is written beside other launches."""

from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed import _symmetric_memory as torch_symmetric
from torch.utils._python_dispatch import TorchDispatchMode

from megapar.kernels.comm.segments import NoSharedMemory, TorchSegments
from megapar.kernels.comm.symmetric import SymmetricMemory
from megapar.launch.pool import WorkerPool
from tests.kernels.comm.mutants import SMALL
from tests.kernels.comm.operations import FORMS, is_exact, small_tiles
from tests.kernels.comm.test_protocol import memory_of


def rendezvous(rank: int, ranks: int, fails: dict[int, str]) -> str:
    """What this rank is told where torch's symmetric memory fails on some. fails: rank -> the call that does."""

    def call(name: str) -> Any:
        if fails.get(rank) == name:
            raise RuntimeError("CUDA driver error: peer access is not supported\nException raised from nowhere.cpp")
        return torch.zeros(64, dtype=torch.uint8) if name == "empty" else SimpleNamespace(buffer_ptrs=[0] * ranks)

    with ExitStack() as patches:
        for name in ("empty", "rendezvous"):
            patches.enter_context(mock.patch.object(torch_symmetric, name, lambda *a, name=name, **b: call(name)))
        patches.enter_context(mock.patch.object(torch.cuda, "synchronize"))
        memory = memory_of()
        try:
            TorchSegments(64, memory.group, torch.device("cpu"))
        except NoSharedMemory as error:
            return str(error)
    return "shared"


@pytest.mark.parametrize("call", ["empty", "rendezvous"])
def test_gpus_that_do_not_reach_each_other(call: str, ranks: WorkerPool) -> None:
    """Every rank is told the same on one line, whichever found it out."""
    assert ranks.run(rendezvous, 3, {}) == ["shared"] * 3
    [told] = set(ranks.run(rendezvous, 3, {1: call}))
    says = "and rank 1 says: CUDA driver error: peer access is not supported; use parallel.tp_overlap=auto"
    needs = "parallel.tp_overlap=symmetric needs GPUs of one host that reach each other's memory"
    assert told == f"{needs}, {says}"


def side_stream(rank: int, ranks: int) -> tuple[list[Any], bool]:
    """The streams that are made for a group on a GPU, whose memory is the host's here; whether launches run aside."""
    zeros, group = torch.zeros, torch.distributed.group.WORLD
    assert group is not None
    with (
        mock.patch.object(torch, "zeros", lambda *shape, device, **options: zeros(*shape, **options)),
        mock.patch.object(SymmetricMemory, "_processors", lambda self: 3),
        mock.patch.object(torch.cuda, "Stream") as stream,
    ):
        memory = SymmetricMemory(group, torch.device("cuda", 0))
    return [(call.args, call.kwargs) for call in stream.mock_calls], memory.has_aside


def test_the_side_stream_comes_before_what_queues(ranks: WorkerPool) -> None:
    """Its programs wait on a product's processors: those that are queued there must not begin before them."""
    assert ranks.run(side_stream, 2) == [([((torch.device("cuda", 0),), {"priority": -1})], True)] * 2


USE = SymmetricMemory.use


class Allocations(TorchDispatchMode):
    """Where memory was taken, in order; None: a use began."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[int | None] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.__name__.startswith(("empty", "new_empty")):
            self.places.append(result.data_ptr())
        return result


def written_beside(rank: int, ranks: int) -> dict[str, bool]:
    """By form, whether its result's memory was taken before the use began, after which launches run beside it."""
    found = {}
    with small_tiles():
        memory = memory_of()
        for form, run in FORMS.items():
            if "all_gather" in form:  # nothing of ours is written aside
                continue
            assert is_exact(form, SMALL, 1, memory)
            x, w = torch.ones(SMALL[0] * ranks, SMALL[1]), torch.ones(SMALL[1], SMALL[2])
            with Allocations() as taken:

                def begin(*given: Any, taken: Allocations = taken) -> Any:
                    taken.places.append(None)
                    return USE(*given)

                with mock.patch.object(SymmetricMemory, "use", begin):
                    result = run(x, w, memory)
            assert taken.places.count(None) == 1
            found[form] = result.data_ptr() in taken.places[: taken.places.index(None)]
    return found


def test_what_is_written_aside_was_allocated_before(ranks: WorkerPool) -> None:
    """Memory that is taken after the product was launched may be that of a temporary which the product still reads."""
    for found in ranks.run(written_beside, 2):
        assert len(found) == 5 and all(found.values()), found
