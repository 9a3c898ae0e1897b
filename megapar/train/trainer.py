"""One rank's part of a training run, put together from its configuration, and one optimizer step of it."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megapar.config.schema import TrainConfig
from megapar.mesh import Mesh
from megapar.optim.optimizer import Optimizer, StepResult
from megapar.optim.schedule import learning_rate
from megapar.parallel.grad_sync import GradSync
from megapar.part import BuildStage, ModelPart
from megapar.pipeline.executor import Executor
from megapar.pipeline.graphs import Graphs, why_not
from megapar.pipeline.stage import Batch
from megapar.schedule.check import check
from megapar.schedule.lower import forward_only, lower
from megapar.tasks import task_kind
from megapar.trace.spans import Span


@dataclass(frozen=True)
class Figures:
    """What one rank knows of a step. loss: this rank's part of the mean; the sum over ranks is the loss."""

    loss: float
    result: StepResult
    seconds: float
    spans: list[Span]


class Step:
    """A step whose work is under way. The first look at one of its figures (see `Figures`) waits for its end.

    On a CPU there is nothing to wait for. On a GPU the next step may have been started by then.
    said: the task's figures of the step, see `Task.step_figures`
    """

    def __init__(self, lr: float, read: Callable[[], Figures], said: Mapping[str, float] | None = None) -> None:
        self.lr, self._read, self.said = lr, read, said or {}

    @cached_property
    def _figures(self) -> Figures:
        return self._read()

    @property
    def loss(self) -> float:
        return self._figures.loss

    @property
    def result(self) -> StepResult:
        return self._figures.result

    @property
    def seconds(self) -> float:
        return self._figures.seconds

    @property
    def spans(self) -> list[Span]:
        return self._figures.spans


@dataclass
class UnderWay:
    """The step that is being made, or the last one. batches: this rank's micro-batches; loss: this rank's part of the
    mean, fp64 on the device; leave_out: set before the update, on all ranks alike, to make none."""

    batches: Sequence[Batch]
    loss: Tensor
    leave_out: bool = False


class Trainer(ModelPart):
    """Adds to a rank's part of the model what trains it: gradient reduction, optimizer, task and schedule.

    Every method is collective: all ranks call it alike.
    compute: makes reduced gradients of a step's micro-batches and returns their losses; a hook may check what it does.
    """

    under_way: UnderWay

    def __init__(
        self,
        config: TrainConfig,
        rank: int,
        build_stage: BuildStage | None = None,
        *,
        mesh: Mesh | None = None,
    ) -> None:
        super().__init__(config, rank, build_stage, mesh=mesh)
        check(self.schedule, training=True)
        self.sync = GradSync(
            self.buffers,
            config.parallel.grad_compression,
            config.parallel.powersgd_rank,
            check=config.parallel.check_gradients,
        )
        self.optimizer = Optimizer(self.buffers, self.sync.owned, config.optim)
        self.task = task_kind(config.task.name).make(config, self.context, self.stages)
        self.graphs: Graphs | None = None
        if config.train.cuda_graphs == "on" and why_not(config) is None:
            self.graphs = Graphs(self.context.weight_grads, self.mesh.timeline)
        self.executor = Executor(
            self.stages, self.mesh, self.context.weight_grads, self.task.loss, self.sync.finish, self.graphs
        )
        self.compute: Callable[[Sequence[Batch]], list[Tensor]] = self.gradients
        if self.mesh.device.type == "cuda":
            self.rehearse()

    def rehearse(self) -> None:
        """Have every kernel of a step compiled. A step afterwards is the same, bit for bit."""
        self.context.weight_grads.begin(self.context.parameters)
        for batch in self.task.examples():  # the first writes main gradients, those behind it add to them
            self.executor.rehearse(self.schedule, batch)

    def gradients(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Reduced gradients of a step's micro-batches. Returns their losses, see `Executor.run`."""
        self.sync.start(self.schedule)
        return self.executor.run(self.schedule, batches)

    def local_gradients(self, batches: Sequence[Batch]) -> list[Tensor]:
        """The same, but main gradients stay sums over this rank's own micro-batches: nothing is reduced."""
        with self.sync.held():
            return self.gradients(batches)

    def step(self, step: int, on_reduced: Callable[[], None] = lambda: None) -> Step:
        """Optimizer step number 1, 2, ... on_reduced: called with the gradients reduced and not yet clipped."""
        self.mesh.timeline.forget()  # what was waited for between two steps, as for a checkpoint, is none of it
        start = time.perf_counter()
        with self.mesh.timeline.doing("data", "samples of the step"):
            batches = self.task.batches(step)
        losses = self.compute(batches)
        self.context.overlaps.check_peers()
        under_way = self.under_way = UnderWay(batches, self._part(losses))
        on_reduced()
        said = self.task.step_figures()
        lr = learning_rate(self.config.optim, step, self.config.train.steps)
        with self.mesh.timeline.span("OPTIMIZER", "optimizer"):
            norm = self.optimizer.start(lr, leave_out=under_way.leave_out)
        if self.config.parallel.grad_compression != "none" or self.sync.leaves_over:
            self.sync.keep_if(norm.isfinite() & (not under_way.leave_out))
        on_host = self._to_host(torch.stack([under_way.loss, norm.squeeze(0)]))
        reading = self.mesh.timeline.cut()
        stop = time.perf_counter()

        def read() -> Figures:
            spans = reading.spans()  # waits for the end of the step
            loss, grad_norm = on_host.tolist()
            # What has said something has waited for the device, and may have written texts, whose time no reading has.
            seconds = stop - start if said else reading.seconds or stop - start
            return Figures(loss, StepResult.of(grad_norm, under_way.leave_out), seconds, spans)

        return Step(lr, read, said)

    def _to_host(self, figures: Tensor) -> Tensor:
        """On the host, once the device has come so far: nothing waits."""
        if not figures.is_cuda:
            return figures
        return torch.empty_like(figures, device="cpu", pin_memory=True).copy_(figures, non_blocking=True)

    def evaluate(self) -> list[float]:
        """This rank's part of what the task measures over the held-out samples, the mean loss first."""
        batches = self.task.validation()
        placement = self.schedule.placement
        schedule = lower(forward_only(placement, len(batches)), len(placement), len(batches))
        measured = self._part(self.executor.run(schedule, batches, self.task.measure), self.task.num_measures)
        self.mesh.timeline.forget()
        return measured.tolist()

    def _part(self, losses: list[Tensor], *shape: int) -> Tensor:
        """The sum, fp64 [shape]. Of ranks that hold the same losses, as tensor-parallel peers do, one counts."""
        counted = losses if self.mesh.first_along("weights", None) else []
        return sum(counted, torch.zeros(shape, dtype=torch.float64, device=self.mesh.device))
