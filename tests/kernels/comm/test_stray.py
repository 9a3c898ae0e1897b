"""Kernels write to their part of a segment and to nothing else: neither beside it, nor beside other tensors."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megapar.kernels._common import Launch, TensorDescriptor
from megapar.kernels.comm.symmetric import FLAG_BYTES, SymmetricMemory, Use, aligned
from megapar.launch.pool import PoolError, WorkerPool
from tests.kernels.cases import guarded
from tests.kernels.comm.operations import FORMS, Shape, is_exact, small_tiles
from tests.kernels.test_guard_pages import extent

LARGE: Shape = (70, 40, 60)  # what makes the segments
SHAPES: list[Shape] = [(33, 17, 23), (32, 16, 48), (1, 5, 3)]  # odd, whole tiles, fewer rows than ranks
UNTOUCHED = 0x5A


def stray_bytes(rank: int, world_size: int) -> list[tuple[str, Shape, int]]:
    """Uses that changed bytes of this rank's segment that were not theirs."""
    assert dist.group.WORLD is not None
    memory = SymmetricMemory(dist.group.WORLD, torch.device("cpu"), 30.0)
    found, uses, checked = [], [], 0
    plain = SymmetricMemory.use

    def use(self: SymmetricMemory, operation: str, num_flags: int, half: int, call: str) -> Use:
        """With all that the next use may not touch marked, on every rank."""
        channel = self.channels.get(operation)
        if channel is not None:
            channel.epoch += 1
            theirs = torch.zeros_like(channel.segments.own, dtype=torch.bool)
            theirs[: world_size * FLAG_BYTES] = True
            theirs[channel.flags_at :][: num_flags * FLAG_BYTES] = True
            theirs[channel.data_at :][:half] = True
            channel.epoch -= 1
            channel.segments.own.masked_fill_(~theirs, UNTOUCHED)
            uses.append((channel.segments.own, theirs))
        dist.barrier()
        return plain(self, operation, num_flags, half, call)

    with small_tiles(), mock.patch.object(SymmetricMemory, "use", use):
        for form in FORMS:
            for epoch, shape in enumerate([LARGE, *SHAPES]):
                uses.clear()
                assert is_exact(form, shape, epoch, memory), (form, shape)
                dist.barrier()
                for own, theirs in uses:
                    if changed := int((own[~theirs] != UNTOUCHED).sum()):
                        found.append((form, shape, changed))
                    own[aligned(world_size * FLAG_BYTES) :].zero_()  # marks on flags would be a later epoch's
                checked += len(uses)
    assert checked >= len(FORMS) * len(SHAPES)
    return found


@contextmanager
def guarded_operands(before: bool) -> Iterator[list[str]]:
    """Launches run on copies beside guard pages of all tensors but those of segments. Yields the kernels' names."""
    names: list[str] = []
    plain = Launch.run

    def run(launch: Launch) -> None:
        names.append(launch.kernel.fn.__name__)
        segment = launch.arguments["flags"].untyped_storage().data_ptr()
        held: dict[int, tuple[Tensor, Tensor]] = {}

        def is_operand(x: Any) -> bool:
            return isinstance(x, Tensor) and x.numel() > 0 and x.untyped_storage().data_ptr() != segment

        for x in sorted((x for x in launch.arguments.values() if is_operand(x)), key=extent):
            flat = x.as_strided((extent(x),), (1,))
            held[x.data_ptr()] = (flat, guarded(flat, before))

        def moved(value: Any) -> Any:
            if isinstance(value, TensorDescriptor):
                return replace(value, base=moved(value.base))
            return held[value.data_ptr()][1].as_strided(value.shape, value.stride()) if is_operand(value) else value

        plain(replace(launch, arguments={name: moved(value) for name, value in launch.arguments.items()}))
        for flat, copy in held.values():
            flat.copy_(copy)

    with mock.patch.object(Launch, "run", run):
        yield names


def run_guarded(rank: int, world_size: int) -> set[str]:
    assert dist.group.WORLD is not None
    memory = SymmetricMemory(dist.group.WORLD, torch.device("cpu"), 30.0)
    ran: set[str] = set()
    with small_tiles():
        for before in (False, True):
            with guarded_operands(before) as names:
                for form in FORMS:
                    for epoch, shape in enumerate(SHAPES):
                        assert is_exact(form, shape, epoch, memory), (form, shape)
            ran |= set(names)
    return ran


def test_segments(ranks: WorkerPool) -> None:
    assert ranks.run(stray_bytes, 3) == [[], [], []]


def test_guard_pages(ranks: WorkerPool) -> None:
    kernels = {"push_kernel", "reduce_kernel", "collect_kernel", "product_push_kernel", "gathered_product_kernel"}
    assert ranks.run(run_guarded, 3) == [kernels] * 3


def refusals(rank: int, world_size: int) -> list[str]:
    """What is refused before anything is shared."""
    from megapar.kernels.comm import exchange, matmul

    assert dist.group.WORLD is not None
    memory = SymmetricMemory(dist.group.WORLD, torch.device("cpu"), 5.0)
    x, wide, whole = torch.ones(4, 5), torch.ones(6, 4), torch.ones(5, 4, dtype=torch.int32)
    fused = (matmul.start_matmul_all_reduce, matmul.start_matmul_reduce_scatter, matmul.all_gather_matmul)
    attempts: list[Any] = [
        *(lambda f=f, w=w: f(x, w, memory) for f in fused for w in (wide, whole, torch.ones(5, 4).double(), x[0])),
        *(lambda x=x: exchange.all_reduce(x, memory) for x in (torch.ones(2, 2, 2), x.double(), whole)),
        lambda: matmul.start_matmul_reduce_scatter(x[:3], x.t(), memory),
    ]
    said = []
    for attempt in attempts:
        with pytest.raises(ValueError, match="need") as caught:
            attempt()
        said.append(str(caught.value))
    assert not memory.channels
    return said


def test_what_does_not_fit_is_refused(ranks: WorkerPool) -> None:
    for said in ranks.run(refusals, 2):
        assert len(said) == 16 and all("\n" not in line for line in said)


def read_beyond(rank: int, world_size: int) -> None:
    from megapar.kernels.comm import exchange

    assert dist.group.WORLD is not None
    memory, push = SymmetricMemory(dist.group.WORLD, torch.device("cpu"), 5.0), exchange.push
    with (
        guarded_operands(False),
        mock.patch.object(exchange, "push", lambda use, x, *a, **b: wrong(push(use, x, *a, **b))),
    ):
        exchange.all_reduce(torch.ones(8, 8), memory)


def wrong(launch: Launch) -> Launch:
    return replace(launch, arguments=launch.arguments | {"x_stride": 9})


def test_a_stray_access_ends_the_process(ranks: WorkerPool) -> None:
    with pytest.raises(PoolError, match=r"SIGSEGV|died|signal 11"):
        ranks.run(read_beyond, 2)
