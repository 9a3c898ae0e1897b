"""The best of what can be found for given costs and a memory limit."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from megapar.schedule.actions import Rows, ScheduleError, loop_placement, v_placement
from megapar.schedule.generator import Generator, Problem
from megapar.schedule.greedy import Policy, list_schedule
from megapar.schedule.lower import lower
from megapar.schedule.simulate import simulate

Score = tuple[float, float]
Candidate = Callable[[Problem], Rows]

POLICIES = [Policy(depth_first, patience) for depth_first in (True, False) for patience in (0.0, 0.5, 1.0)]


COMPARED = 2  # candidates of a long phase that are built in full, the best of the short one


def auto(problem: Problem) -> Rows:
    """The rows with the shortest simulated step among all schedules that fit into the memory limit.

    Candidates are the other generators, and a list scheduler under several policies, placements (loop, and V for two
    stages a rank) and amounts of memory up to the limit. So it is never slower than a named schedule that fits. Of
    equals the one that holds least wins. It builds and replays some fifty tables, and takes that much longer than one;
    with many micro-batches, most of whose steps are alike, the best two of a shorter phase are built in full.
    Raises ScheduleError where the limit can't hold one micro-batch.
    """
    candidates = [*_named(problem), *_listed(problem)]
    short = _shortened(problem)
    if short != problem:
        candidates = [candidate for _, candidate in sorted(_scored(candidates, short), key=lambda pair: pair[0])]
    found: list[tuple[Score, Rows]] = []
    for candidate in candidates:
        rows = candidate(problem)
        score = _score(rows, problem)
        if score[1] <= problem.memory_limit + 1e-9:
            found.append((score, rows))
        if short != problem and len(found) == COMPARED:
            break
    if not found:
        raise ScheduleError(f"memory_limit={problem.memory_limit:g} can't hold one micro-batch on every rank")
    return min(found, key=lambda pair: pair[0])[1]


def _shortened(problem: Problem) -> Problem:
    """The same with fewer micro-batches, if there are many: enough for several rounds of every rank."""
    p, m = problem.ranks, problem.microbatches
    most = max(64, 4 * p)
    return problem if m <= most + p else replace(problem, microbatches=most // p * p + m % p)


def _scored(candidates: list[Candidate], problem: Problem) -> Iterator[tuple[Score, Candidate]]:
    """Those that fit, with their scores in that problem."""
    for candidate in candidates:
        try:
            score = _score(candidate(problem), problem)
        except ScheduleError:  # it takes other numbers of micro-batches
            score = (float("inf"), 0.0)
        if score[1] <= problem.memory_limit + 1e-9:
            yield score, candidate


def _score(rows: Rows, problem: Problem) -> Score:
    """(seconds of a step, most that a rank holds), rounded: the order of sums does not decide between equals."""
    simulation = simulate(lower(rows, problem.stages, problem.microbatches), problem.costs)
    return round(simulation.step_time, 9), max(simulation.peak)


def _named(problem: Problem) -> Iterator[Candidate]:
    from megapar.schedule.build import generators, refusal  # they know this one

    for name, generator in generators().items():
        if name != "auto" and refusal(name, problem.ranks, problem.microbatches, problem.chunks) is None:
            yield generator.build


def _listed(problem: Problem) -> Iterator[Candidate]:
    p, costs = problem.ranks, problem.costs
    placements = [loop_placement(p, problem.chunks)] + ([v_placement(p)] if problem.chunks == 2 else [])
    for placement in placements:
        least = max(
            sum(costs.activation[stage] for stage, owner in enumerate(placement) if owner == rank) for rank in range(p)
        )
        limits = {min(problem.memory_limit, limit) for limit in (p / 2 + 1, p, 2 * p, problem.microbatches)}
        for limit in sorted(limit for limit in limits if limit >= least):
            for policy in POLICIES:
                yield partial(_list_schedule, placement, limit, policy)


def _list_schedule(placement: list[int], limit: float, policy: Policy, problem: Problem) -> Rows:
    return list_schedule(placement, problem.microbatches, problem.costs, limit, policy)


SCHEDULE = Generator(
    "auto",
    "the fastest found for given costs and a memory limit",
    auto,
    chunks=range(1, 1 << 30),
    searches=True,
)
