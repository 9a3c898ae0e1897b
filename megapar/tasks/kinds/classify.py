"""Classification of texts: cross entropy of their classes."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from megapar.data.source import Split
from megapar.pipeline.stage import Batch, Tensors
from megapar.tasks.kind import Figure, TaskKind
from megapar.tasks.sampled import IGNORED, SampledTask, ignore, packed


class Classification(SampledTask):
    """A text to a sample, with padding behind it that no token of it sees. Losses are in nats per text."""

    num_measures = 2

    def arrays(self, split: Split, numbers: np.ndarray, counted: np.ndarray | None) -> dict[str, np.ndarray]:
        found, length = self.samples[split].batch(numbers.reshape(-1)), self.config.train.seq_length
        ids, lengths, classes = (found[name] for name in ("ids", "lengths", "classes"))
        begins = [np.array([0, *([end] if end < length else [])]) for end in lengths.tolist()]
        batches = [begins[first : first + numbers.shape[1]] for first in range(0, len(begins), numbers.shape[1])]
        arrays = {"ids": ids.reshape(*numbers.shape, length), "lengths": lengths.reshape(numbers.shape)}
        return arrays | {"labels": ignore(classes.reshape(numbers.shape), counted)} | packed(batches, length)

    def count(self, split: Split, numbers: np.ndarray) -> int:
        return len(numbers)

    def loss(self, outputs: Tensors, batch: Batch) -> Tensor:
        scores = outputs["scores"].to(self.context.wide_dtype)
        losses = cross_entropy(scores, batch["labels"], ignore_index=IGNORED, reduction="none")
        return losses.sum(dtype=torch.float64) / batch["count"]

    def measure(self, outputs: Tensors, batch: Batch) -> Tensor:
        """The loss, and the share of texts whose class has the highest score."""
        correct = (outputs["scores"].argmax(1) == batch["labels"]).sum(dtype=torch.float64) / batch["count"]
        return torch.stack([self.loss(outputs, batch), correct])

    def figures(self, measured: Sequence[float]) -> dict[str, float | None]:
        return {"val_accuracy": measured[1]}


TASK = TaskKind(
    name="classify",
    about="classes of texts",
    make=Classification,
    loss=Figure("loss", "nats/text", 4),
    figures=(Figure("val_accuracy", "accuracy", 4),),
)
