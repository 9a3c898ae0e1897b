"""ZB-H2 (Qi et al. 2023, "Zero Bubble Pipeline Parallelism", section 2.3)."""

from megapar.schedule.actions import Rows
from megapar.schedule.generator import Generator, Problem
from megapar.schedule.generators.zb_h1 import one_f_one_i


def zb_h2(problem: Problem) -> Rows:
    """ZB-H1 with twice the warm-up: for F = I = W and m >= 2p - 1 no rank idles between its first and last action.

    Every rank holds at most 2p - 1 micro-batches. Ranks start and end one F apart, so a step that all ranks must end
    together still has that much bubble, (p-1) * F.
    """
    return one_f_one_i(problem, warm_up=2, held=2 * problem.ranks - 1)


SCHEDULE = Generator("zb_h2", "no bubble inside a rank's step, twice the memory of 1F1B", zb_h2)
