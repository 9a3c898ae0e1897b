"""Every action of every schedule runs when the simulator says, by a clock that nothing but the stages moves."""

from dataclasses import replace

import pytest

from megapar.launch.pool import WorkerPool
from megapar.schedule.actions import COMPUTE, KINDS, Action, Schedule
from megapar.schedule.build import build, generators
from megapar.schedule.costs import Costs
from megapar.schedule.measured import measured_costs
from megapar.schedule.simulate import Span, simulate
from megapar.trace.spans import Span as Timed
from tests.pipeline.test_wall_clock import fewest_microbatches, sleep_through
from tests.virtual_time import VirtualClock

LATENCY = 1.0


def sleep_virtually(rank: int, world_size: int, schedule: Schedule, costs: Costs) -> list[Timed]:
    with VirtualClock(LATENCY).running() as clock:
        [spans] = sleep_through(rank, world_size, schedule, costs, 1)
    assert clock.now > 0
    return spans


def uneven(stages: int) -> Costs:
    """Whole numbers, whose sums are exact, and no two neighbouring stages alike."""
    forward, input_grad, weight_grad = ([float(each + s % each) for s in range(stages)] for each in (3, 4, 2))
    return replace(
        Costs.even(stages, stages, latency=LATENCY),
        forward=tuple(forward),
        input_grad=tuple(input_grad),
        weight_grad=tuple(weight_grad),
    )


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("name", sorted(generators()))
def test_every_action_runs_when_the_simulator_says(name: str, ranks: int, pool: WorkerPool) -> None:
    """To the bit, with messages that take time, which no sender waits for; and from its spans the costs come back."""
    schedule = build(name, ranks, fewest_microbatches(name, ranks))
    costs = uneven(schedule.stages)
    simulated = simulate(schedule, costs)
    of_ranks = pool.run(sleep_virtually, ranks, schedule, costs)
    for expected, spans in zip(simulated.spans, of_ranks, strict=True):
        assert [span for span in map(computed, spans) if span] == [one for one in expected if one[2].kind in COMPUTE]
    measured = measured_costs(
        schedule, [(span.name, span.seconds) for spans in of_ranks for span in spans if span.kind in KINDS]
    )
    assert measured.forward == costs.forward
    assert simulate(schedule, replace(measured, latency=LATENCY)).spans == simulated.spans
    phases = [span.seconds for spans in of_ranks for span in spans if span.kind == "phase"]
    # A rank's last message may be under way when all has been computed, and it waits for it there.
    assert simulated.step_time <= max(phases) <= simulated.step_time + LATENCY


def computed(span: Timed) -> Span | None:
    return (span.start, span.stop, Action.parse(span.name)) if span.kind in COMPUTE else None
