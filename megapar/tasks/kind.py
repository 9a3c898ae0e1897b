"""What a task is to the rest of megapar."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from megapar.config.schema import TrainConfig
from megapar.parallel.context import StageContext
from megapar.pipeline.stage import Batch, Stage, Tensors


@dataclass(frozen=True)
class Figure:
    """A number of an evaluation: its key in metrics.jsonl, and how it is shown: `2.442 bits/char`."""

    key: str
    unit: str
    digits: int

    def text(self, value: float) -> str:
        return f"{value:.{self.digits}f} {self.unit}"


class Task(Protocol):
    """One rank's part of a task.

    Losses add up: every micro-batch's is its part of the mean over the global batch, so sums over micro-batches and
    ranks need no further scaling. Ranks that share samples get the same from every method.

    tokens_per_step: of the global batch, padding counted; num_measures: numbers that `measure` returns
    """

    tokens_per_step: int
    num_measures: int

    def batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of step 1, 2, ..."""

    def examples(self) -> list[Batch]:
        """One or two micro-batches such as a step's, to try kernels and gradients with."""

    def loss(self, outputs: Tensors, batch: Batch) -> Tensor:
        """On the last stage: a micro-batch's part of the loss, a scalar."""

    def step_figures(self) -> Mapping[str, float]:
        """What the step's micro-batches, whose losses are computed, say besides, before its update: by key, the same on
        all ranks. Collective where it says something; it then waits for the device. Raises UserError, on all ranks
        alike, for what is to be no update."""

    def measure(self, outputs: Tensors, batch: Batch) -> Tensor:
        """On the last stage: a micro-batch's part of the loss and of what else an evaluation measures, [k] fp64."""

    def validation(self) -> list[Batch]:
        """This rank's micro-batches of an evaluation. Their measures, summed over ranks, are the evaluation's."""

    def figures(self, measured: Sequence[float]) -> Mapping[str, float | None]:
        """What an evaluation with these measures says besides the loss, by the keys of the kind's `figures`; None:
        unknown."""


@dataclass(frozen=True)
class TaskKind:
    """A task by name.

    make: (config, context, this rank's stages by number) -> the rank's part
    loss: how the loss is shown; figures: what an evaluation says besides, and how that is shown
    of_steps: those of a step's figures that are shown beside its loss
    """

    name: str
    about: str
    make: Callable[[TrainConfig, StageContext, Mapping[int, Stage]], Task]
    loss: Figure
    figures: tuple[Figure, ...] = ()
    of_steps: tuple[Figure, ...] = ()

    def shown(self, row: Mapping[str, Any]) -> str:
        """An evaluation's row in words: `4.2015 nats/token, 2.442 bits/char`."""
        numbers = [(self.loss, row["val_loss"]), *((figure, row.get(figure.key)) for figure in self.figures)]
        return ", ".join(figure.text(value) for figure, value in numbers if value is not None)

    def change(self, first: Mapping[str, Any], last: Mapping[str, Any]) -> str:
        """Two evaluations in words: `6.9455 -> 4.0015 nats/token, 4.037 -> 2.326 bits/char`."""
        parts = []
        for figure, key in [(self.loss, "val_loss"), *((figure, figure.key) for figure in self.figures)]:
            if first.get(key) is not None and last.get(key) is not None:
                parts.append(f"{first[key]:.{figure.digits}f} -> {figure.text(last[key])}")
        return ", ".join(parts)
