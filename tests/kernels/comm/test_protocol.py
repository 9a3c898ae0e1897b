"""The protocol of kernels/comm, run for real: ranks are processes that share memory, and some of them are late.

flag_model.py proves the protocol for every order of steps; here it is the kernels that are run, in the orders that
delays bring about.
"""

import random
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from queue import SimpleQueue
from types import FunctionType
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megapar.kernels.comm.symmetric import PeersDiffer, PeerTimeout, SymmetricMemory
from megapar.launch.pool import WorkerPool
from tests.kernels.comm.mutants import LARGE, MUTANTS, SMALL
from tests.kernels.comm.operations import FORMS, Shape, is_exact, operands, small_tiles
from tests.kernels.comm.skew import Once, Operation, Place, places_of

SHAPES = (SMALL, (20, 3, 4), (5, 3, 20), (1, 3, 4))  # more tiles one way and the other; fewer rows than ranks
CHANNELS = {
    operation: [form for form in FORMS if form.startswith(operation)]
    for operation in ("all_reduce", "matmul_all_reduce", "matmul_reduce_scatter", "all_gather_matmul")
}


def memory_of(group: dist.ProcessGroup | None = None, timeout_s: float = 60.0) -> SymmetricMemory:
    group = group or dist.group.WORLD
    assert group is not None
    return SymmetricMemory(group, torch.device("cpu"), timeout_s)


# -------------------------------------------------------------------------------------------------------- random delays


def many_epochs(rank: int, ranks: int, forms: list[str], epochs: int, seed: int) -> list[str]:
    """What went wrong in epochs of one channel, their forms and shapes as they come, with a delay at every place."""
    agreed, own = random.Random(seed), random.Random(1000 * seed + rank)
    wrong = []
    with small_tiles(), Operation(lambda place: time.sleep(own.uniform(0, 0.002))).watched() as operation:
        memory = memory_of()
        for epoch in range(1, epochs + 1):
            operation.begins()
            form, shape = agreed.choice(forms), agreed.choice(SHAPES)
            if not is_exact(form, shape, epoch, memory):
                wrong.append(f"rank {rank}, epoch {epoch}: {form} {shape}")
    return wrong


@pytest.mark.parametrize(
    "world_size, epochs",
    [(2, 50), pytest.param(3, 60, marks=pytest.mark.more), pytest.param(2, 200, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("channel", CHANNELS)
def test_many_epochs_with_random_delays(channel: str, world_size: int, epochs: int, ranks: WorkerPool) -> None:
    found = ranks.run(many_epochs, world_size, CHANNELS[channel], epochs, world_size)
    assert found == [[]] * world_size


# ----------------------------------------------------------------------------------------------------- one rank is late

SECONDS = (0.15, 0.05, 0.25, 0.5, 0.1, 0.2)


@dataclass(frozen=True)
class Late:
    """Six epochs of a form, in each of which rank `late` is late at one place.

    places, seconds, shapes: by epoch, from the beginning again at their end.
    """

    form: str
    late: int
    places: tuple[Place, ...]
    seconds: tuple[float, ...] = SECONDS
    shapes: tuple[Shape, ...] = (SMALL,)
    timeout_s: float = 60.0
    mutant: str = ""


def six_epochs(rank: int, ranks: int, job: Late) -> str:
    """What went wrong first on this rank, or ""."""
    mutant = MUTANTS.get(job.mutant)
    missing, patch = (mutant.missing, mutant.patch()) if mutant else (frozenset[tuple[str, str]](), nullcontext())
    wrong = ""
    with small_tiles(), patch:
        memory = memory_of(timeout_s=job.timeout_s)
        for number in range(6):
            place = job.places[number % len(job.places)] if rank == job.late else None
            late = Once(place, job.seconds[number % len(job.seconds)])
            with Operation(late, missing).watched():
                try:
                    exact = is_exact(job.form, job.shapes[number % len(job.shapes)], number + 1, memory)
                except PeerTimeout as error:
                    return wrong or f"PeerTimeout: {error}"
            if not exact:
                wrong = wrong or f"wrong in epoch {number + 1}"
    return wrong


def run_beside(pools: tuple[WorkerPool, ...], jobs: list[tuple[int, Late]]) -> list[list[str]]:
    """Every job's answers by rank, on as many pools as there are: ranks sleep most of the time. jobs: (ranks, what)"""
    free: SimpleQueue[WorkerPool] = SimpleQueue()
    for pool in pools:
        free.put(pool)

    def run(job: tuple[int, Late]) -> list[str]:
        pool = free.get()
        try:
            return pool.run(six_epochs, job[0], job[1])
        finally:
            free.put(pool)

    with ThreadPoolExecutor(len(pools)) as threads:
        return list(threads.map(run, jobs))


@pytest.mark.more
def test_every_rank_late_at_every_place(ranks: WorkerPool, more_ranks: WorkerPool) -> None:
    jobs = [
        (world_size, Late(form, late, tuple(places_of(form))))
        for form in FORMS
        for world_size in (2, 3)
        for late in range(world_size)
    ]
    for (world_size, job), found in zip(jobs, run_beside((ranks, more_ranks), jobs), strict=True):
        assert found == [""] * world_size, job


def test_a_late_rank_and_another_shape(ranks: WorkerPool) -> None:
    """Three tiles of rows, then one: the flag that tells of a late rank's second tile is, in the next epoch, where the
    rank without columns, which has gone ahead, would tell of its first if there were one set of flags."""
    job = Late("all_gather_matmul, idle", 0, ((0, "begun"),), shapes=(LARGE, SMALL))
    assert ranks.run(six_epochs, 2, job) == ["", ""]


@pytest.fixture(scope="module")
def verdicts(ranks: WorkerPool, more_ranks: WorkerPool) -> dict[str, list[str]]:
    """What each mutant's ranks say; "" : the protocol as it is, under the same limit."""
    jobs = [(2, Late(one.form, one.late, (one.place,), (0.8,), one.shapes, 4.0, name)) for name, one in MUTANTS.items()]
    return dict(zip(MUTANTS, run_beside((ranks, more_ranks), jobs), strict=True))


@pytest.mark.more
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants(name: str, verdicts: dict[str, list[str]]) -> None:
    """Every mutant is seen by some rank, and what it shows is what it breaks.

    Equivalent, and so not here: the handshake, its wait or its epoch, in all forms but the one with a rank that has no
    columns. In the others every rank waits for every other in each epoch. When it has done with e - 1 it has seen what
    its peers told it in e - 1, and they tell nothing of e - 1 before they have done with e - 2, which is all that
    `begin` waits for. `test_flag_model.py` proves it.
    """
    assert any(answer.startswith(MUTANTS[name].shows) for answer in verdicts[name]), verdicts[name]


# ------------------------------------------------------------------------------------------------- a rank does not come


def absent(rank: int, ranks: int) -> str:
    """Ranks 1 and 2 are a group; rank 2 comes to its second use when rank 1 has given up. What rank 1 was told."""
    group = dist.new_group([1, 2])
    told = ""
    if rank in (1, 2):
        with small_tiles():
            memory = memory_of(group, timeout_s=0.2)
            patient, impatient = memory.limit * 100, memory.limit
            for epoch in range(1, 5):
                memory.limit = impatient if (rank, epoch) == (1, 2) else patient
                if (rank, epoch) == (2, 2):
                    dist.barrier(group)  # until rank 1 has given up
                try:
                    assert is_exact("matmul_all_reduce to all", SMALL, epoch, memory), epoch
                    assert (rank, epoch) != (1, 2)
                except PeerTimeout as error:
                    assert (rank, epoch) == (1, 2)
                    told = str(error)
                    dist.barrier(group)
    dist.barrier()
    return told


def test_a_rank_that_does_not_come(ranks: WorkerPool) -> None:
    """Its peer is told so, by the ranks' numbers in the whole run, and both can go on when it has come after all."""
    _, told, late = ranks.run(absent, 3, timeout=60)
    waited = "no word from rank 2 within the limit of 0.2 s"
    expected = f"rank 1: {waited} in matmul_all_reduce (symmetric, use 2) over ranks 1, 2"
    assert told == expected and late == ""


# ----------------------------------------------------------------------------------------------- ranks that don't agree

ANOTHER_ROW, ANOTHER_COLUMN, MORE_TILES = (7, 3, 4), (5, 4, 5), (20, 3, 4)


def disagreement(
    rank: int, ranks: int, form: str, other: Shape | torch.dtype, at_first: bool, timeout_s: float = 60.0
) -> str:
    """What this rank is told where rank 1 calls with another shape or dtype, in the first use or the second."""
    with small_tiles():
        memory = memory_of(timeout_s=timeout_s)
        if not at_first:
            assert is_exact(form, LARGE, 1, memory)
        x, w = operands(form, other if rank == 1 and isinstance(other, tuple) else SMALL, 2, rank, ranks)
        if rank == 1 and isinstance(other, torch.dtype):
            x, w = x.to(other), w.to(other)
        try:
            FORMS[form](x, w, memory)
        except (PeersDiffer, PeerTimeout) as error:
            return f"{type(error).__name__}: {error}"
    return "a result"


@pytest.mark.parametrize("form", [form for form in FORMS if "idle" not in form])
def test_ranks_that_do_not_agree(form: str, ranks: WorkerPool) -> None:
    """What is read was written by a call of the same shape and dtype, or is an error. One that has other tiles, with
    other flags, may also wait for what doesn't come."""
    operation = form.split()[0]
    others: tuple[Shape | torch.dtype, ...] = (ANOTHER_ROW, ANOTHER_COLUMN, torch.bfloat16)
    for other in others:
        told = ranks.run(disagreement, 2, form, other, False)
        for me, said in enumerate(told):
            assert said == (
                f"PeersDiffer: rank {me}: rank {1 - me} has a matrix of another shape or dtype in {operation} "
                "(symmetric, use 2) over ranks 0, 1"
            ), (other, told)
    told = ranks.run(disagreement, 2, form, MORE_TILES, False, 1.0)
    assert all(said.startswith(("PeersDiffer", "PeerTimeout")) for said in told), told
    told = ranks.run(disagreement, 2, form, MORE_TILES, True)
    assert all(said.startswith(f"PeersDiffer: rank {me}: {operation} (symmetric) of [") for me, said in enumerate(told))


def larger_alone(rank: int, ranks: int, form: str) -> str:
    """What this rank is told where rank 1 alone needs more memory than before."""
    with small_tiles():
        memory = memory_of()
        assert is_exact(form, SMALL, 1, memory)
        x, w = operands(form, LARGE if rank == 1 else SMALL, 2, rank, ranks)
        try:
            FORMS[form](x, w, memory)
        except PeersDiffer as error:
            if rank == 0:  # a run ends here; rank 1 would, when it misses its peer
                dist.all_gather_object([""] * ranks, "nothing", group=memory.group)
            return str(error)
    return "a result"


@pytest.mark.parametrize("form", [form for form in FORMS if "idle" not in form])
def test_one_rank_alone_that_needs_more_memory(form: str, ranks: WorkerPool) -> None:
    """Its peer, which waits for it, is told at once, and not after the limit of a wait."""
    operation, told = form.split()[0], ranks.run(larger_alone, 2, form)
    differs = (
        f"rank 1's matrix alone needs more memory than any before in {operation} (symmetric, use 2) over ranks 0, 1"
    )
    assert told[0] == f"rank 0: {differs}"
    assert told[1].startswith(f"rank 1: {operation} (symmetric) of [") and told[1].endswith(" on rank 0 of nothing")


def empty_alone(rank: int, ranks: int, form: str, at_first: bool) -> list[str]:
    """What a rank is told in each call. Rank 0 has one more before the others' first, of an empty matrix."""
    told = []
    with small_tiles():
        memory = memory_of()
        if not at_first:
            assert is_exact(form, LARGE, 1, memory)
        x, w = operands(form, SMALL, 2, rank, ranks)
        for given in (x[:0], x) if rank == 0 else (x,):
            try:
                FORMS[form](given, w, memory)
                told.append("a result")
            except (PeersDiffer, PeerTimeout) as error:
                told.append(type(error).__name__)
    return told


@pytest.mark.parametrize("form", [form for form in FORMS if "idle" not in form])
def test_an_empty_matrix_on_one_rank(form: str, ranks: WorkerPool) -> None:
    """Its peer's call meets the next one of this rank, and neither has a result."""
    for at_first in (False, True):
        told = ranks.run(empty_alone, 2, form, at_first)
        assert told == [["a result", "PeersDiffer"], ["PeersDiffer"]], (at_first, told)


# ----------------------------------------------------------------------------------------- bits, and torch.distributed


def exact_operands(rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [18, 40], one row of it zeros, and w [40, 20]. A rank's product is exact in fp32, the sum over ranks is not.

    What numpy's BLAS makes of a row depends, on some processors, on where in a tile it is, which is no fault of ours.
    """
    numbers = torch.Generator().manual_seed(rank)
    x = torch.randint(-4095, 4096, (18, 40), generator=numbers).to(dtype)
    w = torch.randint(-63, 64, (40, 20), generator=numbers).to(dtype)
    x[0] = 0
    return x * 2.0 ** (-13 * rank), w


def results(rank: int, ranks: int, dtype: torch.dtype) -> dict[str, list[Tensor]]:
    """Each form's result, several times, with a delay at every place."""
    own = random.Random(rank)
    x, w = exact_operands(rank, dtype)
    with small_tiles(), Operation(lambda place: time.sleep(own.uniform(0, 0.002))).watched():
        memory = memory_of()
        return {form: [FORMS[form](x, w, memory) for _ in range(3)] for form in FORMS if "idle" not in form}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits(dtype: torch.dtype, ranks: WorkerPool) -> None:
    """From run to run; on every rank what all have; summed by every rank or by the owner of a row; and in the order of
    ranks, in fp32, rounded once."""
    found = ranks.run(results, 3, dtype)
    inputs = [exact_operands(rank, dtype)[0].float() for rank in range(3)]
    for form in found[0]:
        for of_rank in found:
            assert all(torch.equal(of_rank[form][0], again) for again in of_rank[form][1:]), form
        if "all_reduce" in form:
            everyones = found[0][form.replace("to owner", "to all")][0]
            assert all(torch.equal(of_rank[form][0], everyones) for of_rank in found), form
    whole = found[0]["matmul_all_reduce to all"][0]
    assert torch.equal(torch.cat([of_rank["matmul_reduce_scatter"][0] for of_rank in found]), whole)
    assert torch.equal(found[0]["all_reduce to all"][0], (inputs[0] + inputs[1] + inputs[2]).to(dtype))


def without_torch(rank: int, ranks: int) -> None:
    """Every form once to make its channel, and again where each function of torch.distributed raises."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("torch.distributed in an operation")

    with small_tiles(), ExitStack() as patches:
        memory = memory_of()
        for epoch in (1, 2):
            for form in FORMS:
                assert is_exact(form, SMALL, epoch, memory), form
            for name, value in list(vars(dist).items()) if epoch == 1 else ():
                if isinstance(value, FunctionType) and not name.startswith("_"):
                    patches.enter_context(mock.patch.object(dist, name, refuse))
                    if hasattr(dist.distributed_c10d, name):
                        patches.enter_context(mock.patch.object(dist.distributed_c10d, name, refuse))


def test_no_function_of_torch_in_an_operation(ranks: WorkerPool) -> None:
    ranks.run(without_torch, 2)
