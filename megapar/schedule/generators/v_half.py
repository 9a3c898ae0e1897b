"""V-Half (Qi et al. 2024, "Pipeline Parallelism with Controllable Memory", section 4)."""

from megapar.schedule.actions import Rows
from megapar.schedule.generator import Generator, Problem
from megapar.schedule.v_block import Pace, v_block


def v_half(problem: Problem) -> Rows:
    """A V in half the memory of 1F1B, and with half its bubble.

    Every rank holds at most p/2 + 1 micro-batches' worth. For F = I = W and m >= 4p the step takes m * (F + I + W) and
    at most 3/2 * p * F, where 1F1B adds 3 * (p-1) * F.
    """
    return v_block(problem, Pace(2, 1, 2, 1), limit=min(problem.ranks, problem.ranks / 2 + 1))


SCHEDULE = Generator("v_half", "V of two stages a rank: half the memory of 1F1B", v_half, chunks=range(2, 3))
