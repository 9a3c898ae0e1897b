"""ZB-H1 (Qi et al. 2023, "Zero Bubble Pipeline Parallelism", section 2.2)."""

from megapar.schedule.actions import Action, Rows
from megapar.schedule.fill import fill_weights
from megapar.schedule.generator import Generator, Problem
from megapar.schedule.generators.one_f_one_b import alternate


def one_f_one_i(problem: Problem, warm_up: int, held: int) -> Rows:
    """F and I as in 1F1B with `warm_up` forwards ahead per rank that follows; W fills in up to `held` of them."""
    p, m = problem.ranks, problem.microbatches
    rows = []
    for rank in range(p):
        forwards, backwards = ([Action(rank, kind, i) for i in range(m)] for kind in "FI")
        rows.append(alternate(forwards, backwards, min(warm_up * (p - rank - 1), m)))
    return fill_weights(rows, range(p), problem.costs, [held * units for units in problem.costs.activation])


def zb_h1(problem: Problem) -> Rows:
    """1F1B whose W runs in the bubble. Every rank holds at most p micro-batches, what 1F1B's first rank holds.

    For m >= p and W <= I the bubble is (p-1) * (F + I - W), where 1F1B's is (p-1) * (F + I + W).
    """
    return one_f_one_i(problem, warm_up=1, held=problem.ranks)


SCHEDULE = Generator("zb_h1", "1F1B with W in the bubble: a third of it left", zb_h1)
