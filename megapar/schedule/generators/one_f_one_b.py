"""1F1B (Narayanan et al. 2019, "PipeDream"; with a flush, Narayanan et al. 2021, section 2.2)."""

from megapar.schedule.actions import Action, Row, Rows
from megapar.schedule.generator import Generator, Problem


def alternate(forwards: Row, backwards: Row, warm_up: int) -> Row:
    """`warm_up` forwards, then one forward and one backward in turn, then the backwards that are left."""
    row = forwards[:warm_up]
    for forward, backward in zip(forwards[warm_up:], backwards, strict=False):
        row += [forward, backward]
    return row + backwards[len(forwards) - warm_up :]


def one_forward_one_backward(problem: Problem) -> Rows:
    """After a warm-up of forwards each forward is followed by the oldest backward.

    Bubble (p-1)/(m+p-1), GPipe's; rank r holds min(p - r, m) micro-batches.
    """
    p, m = problem.ranks, problem.microbatches
    rows = []
    for rank in range(p):
        forwards, backwards = ([Action(rank, kind, i) for i in range(m)] for kind in "FB")
        rows.append(alternate(forwards, backwards, min(p - rank - 1, m)))
    return rows


SCHEDULE = Generator("1f1b", "one forward, one backward: holds at most p micro-batches", one_forward_one_backward)
