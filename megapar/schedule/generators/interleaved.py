"""Interleaved 1F1B (Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters", 2.2)."""

from megapar.schedule.actions import Action, Rows
from megapar.schedule.generator import Generator, Problem
from megapar.schedule.generators.one_f_one_b import alternate


def groups(microbatches: int, ranks: int) -> list[range]:
    """Micro-batches in groups of at least `ranks` (or all in one), as equal as can be, the larger first."""
    count = max(1, microbatches // ranks)
    ends = [-(-microbatches * (i + 1) // count) for i in range(count)]
    return [range(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]


def interleaved(problem: Problem) -> Rows:
    """1F1B over stages dealt out in turn: rank r has r, r + p, r + 2p, ...

    A group of micro-batches goes through the rank's first stage, then through its second, and so on; backwards the same
    from the last. With m a multiple of p the bubble is (p-1)/(m*v+p-1). Any other m works: groups have p to 2p - 1.
    """
    p, v, m = problem.ranks, problem.chunks, problem.microbatches
    parts = groups(m, p)
    forward_order = [(chunk, i) for part in parts for chunk in range(v) for i in part]
    backward_order = [(chunk, i) for part in parts for chunk in reversed(range(v)) for i in part]
    rows = []
    for rank in range(p):
        forwards = [Action(chunk * p + rank, "F", i) for chunk, i in forward_order]
        backwards = [Action(chunk * p + rank, "B", i) for chunk, i in backward_order]
        # The first backward needs the first group on the last chunk; twice the way to the last rank keeps it fed.
        warm_up = (v - 1) * len(parts[0]) + (2 if v > 1 else 1) * (p - rank - 1)
        rows.append(alternate(forwards, backwards, min(warm_up, m * v)))
    return rows


SCHEDULE = Generator(
    "interleaved", "1F1B over several stages a rank: 1/chunks of the bubble", interleaved, chunks=range(2, 1 << 30)
)
