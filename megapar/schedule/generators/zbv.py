"""ZB-V (Qi et al. 2023, "Zero Bubble Pipeline Parallelism", section 6)."""

from megapar.schedule.actions import Rows
from megapar.schedule.generator import Generator, Problem
from megapar.schedule.v_block import Pace, v_block


def zbv(problem: Problem) -> Rows:
    """A V of two stages per rank with no bubble for F = I = W, in the memory of 1F1B.

    For m >= 2p the step takes m * (F + I + W) and the way to the last rank, (p-1) * F/2. Every rank holds up to 2p
    stages' activations, p micro-batches' worth.
    """
    return v_block(problem, Pace(4, 2, 4, 2), limit=problem.ranks)


SCHEDULE = Generator(
    "zbv",
    "V of two stages a rank: no bubble for F = I = W, memory of 1F1B",
    zbv,
    chunks=range(2, 3),
)
