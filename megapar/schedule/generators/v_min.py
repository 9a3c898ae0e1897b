"""V-Min (Qi et al. 2024, "Pipeline Parallelism with Controllable Memory", section 4)."""

from megapar.schedule.actions import Rows
from megapar.schedule.generator import Generator, Problem
from megapar.schedule.v_block import Pace, v_block


def v_min(problem: Problem) -> Rows:
    """A V in a third of the memory of 1F1B: a micro-batch passes as fast as it can.

    Every rank holds at most p/3 + 3/2 micro-batches' worth. For F = I = W and m >= 4p the step takes m * (F + I + W)
    and at most 2p * F, where 1F1B adds 3 * (p-1) * F. With other costs passes meet, and the bubble grows with m.
    """
    return v_block(problem, Pace(1, 1, 1, 1), limit=min(problem.ranks, 2 * problem.ranks // 3 / 2 + 1.5))


SCHEDULE = Generator("v_min", "V of two stages a rank: a third of the memory of 1F1B", v_min, chunks=range(2, 3))
