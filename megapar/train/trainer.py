"""One rank's part of a training run, put together from its configuration, and one optimizer step of it."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor

from megapar.config.errors import UserError
from megapar.config.schema import TrainConfig
from megapar.config.stages import make_schedule, ties
from megapar.kernels import interprets, use_backend
from megapar.kernels._common import check_overflow
from megapar.mesh import Mesh
from megapar.models.stage import build_stage
from megapar.optim.adamw import Optimizer, StepResult, learning_rate
from megapar.parallel.buffers import StageBuffers
from megapar.parallel.context import StageContext
from megapar.parallel.grad_sync import GradSync
from megapar.parallel.plain import adopt
from megapar.pipeline.executor import Executor
from megapar.pipeline.stage import Stage
from megapar.schedule.check import check
from megapar.schedule.lower import forward_only, lower
from megapar.trace import Span
from megapar.train.task import TASKS

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Step:
    """What one rank knows of a step. loss: this rank's part of the mean; the sum over ranks is the loss."""

    loss: float
    result: StepResult
    lr: float
    seconds: float
    spans: list[Span]


def make_mesh(config: TrainConfig, rank: int) -> Mesh:
    device = torch.device("cuda", torch.cuda.current_device()) if config.train.device == "cuda" else torch.device("cpu")
    return Mesh(config.parallel.layout, rank, device, timedelta(seconds=config.train.timeout_s))


class ModelPart:
    """A rank's part of the model: its stages by number and the flat buffers of their parameters.

    build_stage: makes a stage from (config, context); the default is the configured Transformer.
    mesh: one of this very layout that is there already: torch can't make the groups of a closed one a second time.
    weights_only: for weights that are loaded and not trained, see `StageBuffers`.
    """

    def __init__(
        self,
        config: TrainConfig,
        rank: int,
        build_stage: Callable[[TrainConfig, StageContext], Stage] = build_stage,
        *,
        mesh: Mesh | None = None,
        weights_only: bool = False,
    ) -> None:
        train, parallel = config.train, config.parallel
        try:
            use_backend(config.kernels.backend)
        except ValueError as error:
            raise UserError(str(error)) from None
        if interprets():
            check_overflow(False)
        self.config = config
        self.mesh = mesh or make_mesh(config, rank)
        self.schedule = make_schedule(config)
        self.context = StageContext(
            self.mesh,
            DTYPES[train.dtype],
            sequence_parallel=parallel.sequence_parallel,
            tp_overlap=parallel.tp_overlap,
            seed=train.seed,
            placement=self.schedule.placement,
        )
        for name, stages in ties(config).items():
            self.context.tie(name, stages)
        self.stages: dict[int, Stage] = {}
        for number in self.schedule.stages_of(self.mesh["pp"].index):
            self.context.stage = number
            with self.context.seeded(f"stage {number}"):
                self.stages[number] = build_stage(config, self.context)
            adopt(self.stages[number], self.context)
        self.buffers = StageBuffers(
            self.context, bucket_size=parallel.bucket_size, zero=parallel.zero == 1, weights_only=weights_only
        )

    def close(self) -> None:
        """Give back what peers share, and destroy the mesh's groups."""
        self.context.overlaps.close()
        self.mesh.close()


class Trainer(ModelPart):
    """Adds to a rank's part of the model what trains it: gradient reduction, optimizer, task and schedule.

    on_reduced: called each step with the gradients reduced and not yet clipped.
    Every method is collective: all ranks call it alike.
    """

    def __init__(
        self,
        config: TrainConfig,
        rank: int,
        build_stage: Callable[[TrainConfig, StageContext], Stage] = build_stage,
        *,
        mesh: Mesh | None = None,
    ) -> None:
        super().__init__(config, rank, build_stage, mesh=mesh)
        check(self.schedule)
        self.sync = GradSync(
            self.buffers,
            config.parallel.grad_compression,
            config.parallel.powersgd_rank,
            check=config.parallel.check_gradients,
        )
        self.optimizer = Optimizer(self.buffers, self.sync.owned, config.optim)
        last = self.stages.get(self.schedule.stages - 1)
        self.task = TASKS[config.task.name](config, self.context, last)  # type: ignore[arg-type]
        self.executor = Executor(
            self.stages, self.mesh, self.context.weight_grads, self.task.loss, reduce=self.sync.finish
        )
        self.on_reduced: Callable[[], None] = lambda: None

    def step(self, step: int) -> Step:
        """Optimizer step number 1, 2, ..."""
        self.mesh.timeline.take()  # what was waited for between two steps, as for a checkpoint, is no part of this one
        start = time.perf_counter()
        self.sync.start(self.schedule)
        losses = self.executor.run(self.schedule, self.task.batches(step))
        self.context.overlaps.check_peers()
        self.on_reduced()
        lr = learning_rate(self.config.optim, step, self.config.train.steps)
        with self.mesh.timeline.span("OPTIMIZER", "optimizer"):
            result = self.optimizer.step(lr)
        if result.skipped:
            self.sync.forget()
        loss = self._part(losses)
        return Step(loss, result, lr, time.perf_counter() - start, self.mesh.timeline.take())

    def evaluate(self) -> float:
        """This rank's part of the mean loss over the held-out samples."""
        batches, _ = self.task.validation()
        placement = self.schedule.placement
        schedule = lower(forward_only(placement, len(batches)), len(placement), len(batches))
        loss = self._part(self.executor.run(schedule, batches))
        self.mesh.timeline.take()
        return loss

    def _part(self, losses: list[Tensor]) -> float:
        """Of ranks that hold the same losses, as tensor-parallel peers do, one counts."""
        return float(sum(losses)) if losses and self.mesh.first_along("weights", None) else 0.0
