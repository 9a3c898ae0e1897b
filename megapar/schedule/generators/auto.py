"""The best of what can be found for given costs and a memory limit."""

from collections.abc import Iterator

from megapar.schedule.actions import Rows, ScheduleError, loop_placement, v_placement
from megapar.schedule.generator import Generator, Problem
from megapar.schedule.greedy import Policy, list_schedule
from megapar.schedule.lower import lower
from megapar.schedule.simulate import simulate

POLICIES = [Policy(depth_first, patience) for depth_first in (True, False) for patience in (0.0, 0.5, 1.0)]


def auto(problem: Problem) -> Rows:
    """The rows with the shortest simulated step among all schedules that fit into the memory limit.

    Candidates are the other generators, and a list scheduler under several policies, placements (loop, and V for two
    stages a rank) and amounts of memory up to the limit. So it is never slower than a named schedule that fits. Of
    equals the one that holds least wins. It builds and replays some fifty tables, and takes that much longer than one.
    Raises ScheduleError where the limit can't hold one micro-batch.
    """
    best: tuple[tuple[float, float], Rows] | None = None
    for rows in _candidates(problem):
        simulation = simulate(lower(rows, problem.stages, problem.microbatches), problem.costs)
        # Rounded, so that sums in another order don't decide between equals.
        score = (round(simulation.step_time, 9), max(simulation.peak))
        if score[1] <= problem.memory_limit + 1e-9 and (best is None or score < best[0]):
            best = (score, rows)
    if best is None:
        raise ScheduleError(f"memory_limit={problem.memory_limit:g} can't hold one micro-batch on every rank")
    return best[1]


def _candidates(problem: Problem) -> Iterator[Rows]:
    from megapar.schedule.build import generators, refusal  # they know this one

    p, m = problem.ranks, problem.microbatches
    for name, generator in generators().items():
        if name != "auto" and refusal(name, p, m, problem.chunks) is None:
            yield generator.build(problem)
    placements = [loop_placement(p, problem.chunks)] + ([v_placement(p)] if problem.chunks == 2 else [])
    for placement in placements:
        least = max(
            sum(problem.costs.activation[stage] for stage, owner in enumerate(placement) if owner == rank)
            for rank in range(p)
        )
        limits = {min(problem.memory_limit, limit) for limit in (p / 2 + 1, p, 2 * p, m)}
        for limit in sorted(limit for limit in limits if limit >= least):
            for policy in POLICIES:
                yield list_schedule(placement, m, problem.costs, limit, policy)


SCHEDULE = Generator(
    "auto",
    "the fastest found for given costs and a memory limit",
    auto,
    chunks=range(1, 1 << 30),
)
