"""GPipe (Huang et al. 2019, "GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism")."""

from megapar.schedule.actions import Action, Rows
from megapar.schedule.generator import Generator, Problem


def gpipe(problem: Problem) -> Rows:
    """All forwards, then all backwards. Bubble (p-1)/(m+p-1); every rank holds all m micro-batches."""
    everything = range(problem.microbatches)
    return [[Action(rank, kind, m) for kind in "FB" for m in everything] for rank in range(problem.ranks)]


SCHEDULE = Generator("gpipe", "all forwards, then all backwards: holds every micro-batch", gpipe)
