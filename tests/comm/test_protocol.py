"""The protocol of kernels/comm, run for real: ranks are processes that share memory, and some of them are late.

flag_model.py proves the protocol for every order of steps; here it is the kernels that are run, in the orders that
delays bring about.
"""

import random
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megapar.kernels.comm.symmetric import PeerTimeout, SymmetricMemory
from megapar.launch.pool import WorkerPool
from tests.comm.operations import FORMS, Shape, is_exact, small_tiles
from tests.comm.skew import Once, Operation, Place

SHAPES = ((5, 3, 4), (1, 3, 4), (20, 3, 4), (5, 3, 20), (5, 20, 4))  # several tiles each way, fewer rows than ranks
SMALL = SHAPES[0]
CHANNELS = {
    operation: [form for form in FORMS if form.startswith(operation)]
    for operation in ("all_reduce", "matmul_all_reduce", "matmul_reduce_scatter", "all_gather_matmul")
}


def memory_of(group: Any = None, timeout_s: float = 60.0) -> SymmetricMemory:
    return SymmetricMemory(group or dist.group.WORLD, torch.device("cpu"), timeout_s)


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


@pytest.mark.parametrize("world_size, epochs", [(3, 200), (2, 60)])
@pytest.mark.parametrize("channel", CHANNELS)
def test_many_epochs_with_random_delays(channel: str, world_size: int, epochs: int, ranks: WorkerPool) -> None:
    found = ranks.run(many_epochs, world_size, CHANNELS[channel], epochs, world_size)
    assert found == [[]] * world_size


# ------------------------------------------------------------------------------------------------------ one rank is late


def six_epochs(
    rank: int, ranks: int, form: str, late: int, places: list[Place], seconds: list[float],
    shapes: tuple[Shape, ...] = (SMALL,), timeout_s: float = 60.0, mutant: str = "",
) -> str:  # fmt: skip
    """What went wrong first on this rank in six epochs, in each of which rank `late` is late at one place, or "".

    places, seconds, shapes: by epoch, from the beginning again at their end. mutant: of the table below.
    """
    broken = frozenset()
    with small_tiles():
        memory = memory_of(timeout_s=timeout_s)
        wrong = ""
        for number in range(6):
            place = places[number % len(places)] if rank == late else None
            shape = shapes[number % len(shapes)]
            with Operation(Once(place, seconds[number % len(seconds)]), broken).watched():
                try:
                    exact = is_exact(form, shape, number + 1, memory)
                except PeerTimeout as error:
                    return wrong or f"PeerTimeout: {error}"
            if not exact:
                wrong = wrong or f"wrong result in epoch {number + 1}"
    return wrong


def test_a_late_rank_and_another_shape(ranks: WorkerPool) -> None:
    """Three tiles of rows, then one: the flag that tells of a late rank's second tile is, in the next epoch, where the
    rank without columns, which has gone ahead, tells of its first."""
    arguments = "all_gather_matmul, idle", 0, [(0, "begun")], [0.3], ((40, 3, 4), SMALL), 1.0
    assert ranks.run(six_epochs, 2, *arguments) == ["", ""]
