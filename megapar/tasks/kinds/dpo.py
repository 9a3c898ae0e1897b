"""Direct preference optimisation (Rafailov et al. 2023, equation 7): the chosen response of a pair becomes likelier
than the rejected one, as seen from a frozen reference."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from megapar.config.schema import TrainConfig
from megapar.data.source import Split
from megapar.parallel.context import StageContext
from megapar.pipeline.stage import Batch, Stage, Tensors
from megapar.tasks.kind import Figure, TaskKind
from megapar.tasks.kinds.sft import laid_out
from megapar.tasks.reference import Reference
from megapar.tasks.sampled import SampledTask


class PreferenceOptimization(SampledTask):
    """A sample is a pair in one row. Its loss, in nats per pair: -log sigmoid(beta * margin), where the margin is how
    much more the model prefers the chosen response, in nats, than the reference does."""

    num_measures = 3

    def __init__(self, config: TrainConfig, context: StageContext, stages: Mapping[int, Stage]) -> None:
        super().__init__(config, context, stages)
        self.reference = Reference(config, self.mesh)

    def arrays(self, split: Split, numbers: np.ndarray, counted: np.ndarray | None) -> dict[str, np.ndarray]:
        pairs, length = self.samples[split].batch(numbers.reshape(-1)), self.config.train.seq_length
        rejected = np.zeros((len(pairs), length), dtype=np.int64)
        for row, (chosen, _) in zip(rejected, pairs, strict=True):
            row[len(chosen[0]) - 1 :] = 1
        number = np.arange(numbers.shape[1])[:, None]  # of the pair in its micro-batch
        arrays = laid_out(pairs, numbers.shape, length, counted)
        arrays["responses"] = 2 * number + rejected.reshape(*numbers.shape, length)
        return arrays | {"counted": np.ones(numbers.shape, dtype=bool) if counted is None else counted}

    def count(self, split: Split, numbers: np.ndarray) -> int:
        return len(numbers)

    def _batches(self, *args, **kwargs) -> list[Batch]:
        """With `reference` [2 B] fp64, the reference's log-likelihoods of the responses, on the last stage."""
        return self.reference.beside(super()._batches(*args, **kwargs), self.log_likelihoods)

    def log_likelihoods(self, outputs: Tensors, batch: Batch) -> Tensor:
        """Of every response, in nats, fp64 [2 B]: chosen and rejected of every pair in turn."""
        losses = self.token_losses(outputs, batch).double()
        sums = losses.new_zeros(2 * len(batch["ids"]))
        return sums.index_add(0, batch["responses"].reshape(-1), -losses)

    def margins(self, outputs: Tensors, batch: Batch) -> Tensor:
        """beta * how much more the model prefers each chosen response than the reference does, fp64 [B]."""
        chosen, rejected = (self.log_likelihoods(outputs, batch) - batch["reference"]).view(-1, 2).unbind(1)
        return self.config.task.beta * (chosen - rejected)

    def loss(self, outputs: Tensors, batch: Batch) -> Tensor:
        return self._mean(softplus(-self.margins(outputs, batch)), batch)

    def measure(self, outputs: Tensors, batch: Batch) -> Tensor:
        """The loss, the share of pairs that are preferred rightly, and the mean margin."""
        margins = self.margins(outputs, batch)
        found = (softplus(-margins), (margins > 0).double(), margins)
        return torch.stack([self._mean(one, batch) for one in found])

    def figures(self, measured: Sequence[float]) -> dict[str, float | None]:
        return {"val_accuracy": measured[1], "val_margin": measured[2]}

    def _mean(self, values: Tensor, batch: Batch) -> Tensor:
        return values.where(batch["counted"], 0.0).sum() / batch["count"]


TASK = TaskKind(
    name="dpo",
    about="preferred responses",
    make=PreferenceOptimization,
    loss=Figure("loss", "nats/pair", 4),
    figures=(Figure("val_accuracy", "accuracy", 3), Figure("val_margin", "margin", 3)),
)
