"""What a schedule takes by the clock is what the simulator says: with stages that sleep, and with those of a model.

`test_virtual_time.py` says the same of every action, by a clock that other work on the machine does not move.
"""

import time
from dataclasses import dataclass, replace
from itertools import count
from statistics import median
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megapar.config.layout import Layout
from megapar.config.schema import TrainConfig
from megapar.config.stages import make_schedule
from megapar.launch.pool import WorkerPool
from megapar.mesh import Mesh
from megapar.parallel.weight_grad import LocalParameter, WeightGrads
from megapar.pipeline.executor import Batch, Executor, Tensors
from megapar.pipeline.stage import TensorSpec
from megapar.schedule.actions import KINDS, Schedule
from megapar.schedule.build import build, default_chunks, generators, refusal
from megapar.schedule.costs import Costs
from megapar.schedule.measured import measured_costs
from megapar.schedule.simulate import simulate
from megapar.trace.spans import BUSY, Span
from megapar.train.trainer import Trainer
from tests.tiny import tiny_config

pytestmark = pytest.mark.slow

# Of a stage. Waking up, autograd and a transfer take 0.3 to 1 ms of an action on two shared cores (measured).
FORWARD, INPUT_GRAD, WEIGHT_GRAD = 0.03, 0.036, 0.024


class Nap(torch.autograd.Function):
    """Sleeps through F and I, and leaves a sleep for W; none of them needs a core."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stage: "SleepingStage") -> Tensor:
        ctx.stage = stage
        time.sleep(stage.seconds["F"])
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        stage = ctx.stage
        time.sleep(stage.seconds["I"])
        stage.weight_grads.submit(lambda into: time.sleep(stage.seconds["W"]), stage.parameter)
        return grad * 2, None


@dataclass(eq=False)
class SleepingStage(nn.Module):
    seconds: dict[str, float]
    weight_grads: WeightGrads

    def __post_init__(self) -> None:
        super().__init__()
        self.parameter = LocalParameter(self, "none", (1,), [], 1, grad=torch.zeros(1))

    def received(self, batch: Batch) -> dict[str, TensorSpec]:
        return {"x": TensorSpec((4,), torch.float32)}

    sent = received

    def forward(self, received: Tensors, batch: Batch) -> Tensors:
        x = received["x"] if received else torch.ones(4, requires_grad=True)
        return {"x": Nap.apply(x, self)}


def sleep_through(rank: int, world_size: int, schedule: Schedule, costs: Costs, steps: int) -> list[list[Span]]:
    """A rank's spans in every step, of stages that sleep as long as they cost."""
    mesh = Mesh(Layout(pp=world_size), rank)
    weight_grads = WeightGrads()
    stages = {}
    for stage in schedule.stages_of(rank):
        times = {"F": costs.forward[stage], "I": costs.input_grad[stage], "W": costs.weight_grad[stage]}
        stages[stage] = SleepingStage(times, weight_grads)
    executor = Executor(stages, mesh, weight_grads, lambda outputs, batch: outputs["x"].sum())
    taken = []
    for _ in range(steps):
        dist.barrier()
        losses = executor.run(schedule, [{}] * schedule.microbatches)
        assert [float(loss) for loss in losses] in ([], [4.0 * 2**schedule.stages] * schedule.microbatches)
        taken.append(mesh.timeline.take())
    mesh.close()
    return taken


def fewest_microbatches(name: str, ranks: int) -> int:
    """Enough for a steady phase, and for the schedule."""
    return next(m for m in count(ranks + 2) if refusal(name, ranks, m, default_chunks(name)) is None)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("name", sorted(generators()))
def test_the_wall_clock_is_the_simulators(name: str, ranks: int, pool: WorkerPool) -> None:
    """The step's time within 5 %, the bubble within 5 points, in the fastest of three steps.

    A sleep is never shorter than asked for, and what else the machine does only adds to it.
    """
    schedule = build(name, ranks, fewest_microbatches(name, ranks))
    costs = Costs.even(schedule.stages, schedule.stages, F=FORWARD, I=INPUT_GRAD, W=WEIGHT_GRAD)
    simulated = simulate(schedule, costs)
    steps = list(zip(*pool.run(sleep_through, ranks, schedule, costs, 4), strict=True))[1:]
    taken, busy = min((longest(step), sum(map(seconds_busy, step)) / ranks) for step in steps)
    assert taken == pytest.approx(simulated.step_time, rel=0.05)
    assert 1 - busy / taken == pytest.approx(simulated.mean_bubble, abs=0.05)


def longest(step: tuple[list[Span], ...]) -> float:
    return max(span.seconds for spans in step for span in spans if span.kind == "phase")


def seconds_busy(spans: list[Span]) -> float:
    return sum(span.seconds for span in spans if span.kind in BUSY)


def train_and_time(rank: int, world_size: int, config: TrainConfig) -> list[list[tuple[str, str, float]]]:
    """(kind, name, seconds) of every span of every step but the first two."""
    trainer = Trainer(config, rank)
    steps = [trainer.step(step).spans for step in range(1, config.train.steps + 1)]
    trainer.close()
    return [[(span.kind, span.name, span.seconds) for span in spans] for spans in steps[2:]]


@pytest.mark.parametrize("name", ["1f1b", "zb_h1", "zbv"])
def test_a_models_step_takes_what_its_costs_say(name: str, pool: WorkerPool, tokens: str) -> None:
    """Within 10 %, by the costs of the step before: the median of twenty pairs. Two ranks on two cores, alone there.

    A sender's core copies what it sends, 0.3 ms of a 6 ms action (measured), so transfers count and overlap nothing.
    """
    values: dict[str, Any] = {"model.layers": 4, "model.hidden": 128, "model.ffn": 384, "train.seq_length": 128}
    values |= {"train.dtype": "fp32", "train.micro_batch_size": 4, "train.steps": 23, "pipeline.schedule": name}
    values |= {"train.global_batch_size": 16}
    config = tiny_config(tokens, "pp2", **values)
    schedule = make_schedule(config)
    foreseen, taken = [], []
    for of_ranks in zip(*pool.run(train_and_time, 2, config), strict=True):
        spans = [span for spans in of_ranks for span in spans]
        costs = measured_costs(schedule, [(name, seconds) for kind, name, seconds in spans if kind in KINDS])
        sends = [seconds for kind, _, seconds in spans if kind in ("SEND_F", "SEND_B")]
        costs = replace(costs, transfer=median(sends), overlap=False)
        foreseen.append(simulate(schedule, costs).step_time)
        taken.append(max(seconds for kind, _, seconds in spans if kind == "phase"))
    ratios = [after / before for before, after in zip(foreseen[:-1], taken[1:], strict=True)]
    assert median(ratios) == pytest.approx(1.0, abs=0.1)
