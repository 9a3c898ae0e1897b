"""Next-token prediction.

A batch is a dict of tensors. The model reads `ids`, `samples` and `step` of it (`megapar.models.tokens`); what else is
in it is the task's own business.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megapar.config.errors import ConfigError
from megapar.data.source import Split
from megapar.pipeline.stage import Batch, Tensors
from megapar.tasks.kind import Figure, TaskKind
from megapar.tasks.sampled import SampledTask, ignore, packed


class LanguageModeling(SampledTask):
    """Next-token prediction on windows of a token file. Losses are in nats per token."""

    def arrays(self, split: Split, numbers: np.ndarray, counted: np.ndarray | None) -> dict[str, np.ndarray]:
        windows = self.samples[split].batch(numbers.reshape(-1)).reshape(*numbers.shape, -1)
        arrays = {"ids": windows[..., :-1], "labels": ignore(windows[..., 1:], counted)}
        return arrays | self.documents(split, numbers)

    def count(self, split: Split, numbers: np.ndarray) -> int:
        return len(numbers) * self.config.train.seq_length

    def loss(self, outputs: Tensors, batch: Batch) -> Tensor:
        # The sum is fp64: a rank that sums other tokens should not lose other digits.
        return self.token_losses(outputs, batch).sum(dtype=torch.float64) / batch["count"]

    def figures(self, measured: Sequence[float]) -> dict[str, float | None]:
        """Bits per character: compression of the held-out text, comparable between tokenizers; None for tokens of
        unknown origin, or that stand for no character (ends of documents)."""
        held_out = self.samples["valid"]
        counts = getattr(held_out, "char_counts", None)
        if counts is None:
            return {"val_bits_per_char": None}
        labels = held_out.batch(self.held_out_numbers())[:, 1:]
        characters = int(counts[labels].sum(dtype=np.int64))
        bits = measured[0] * labels.size / math.log(2)
        return {"val_bits_per_char": bits / characters if characters else None}

    def documents(self, split: Split, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """With `data.document_mask` where the documents of samples [M, B] stand, see `packed`."""
        if not self.config.data.document_mask:
            return {}
        begins = getattr(self.samples[split], "begins", None)
        if begins is None:
            problem = f"samples of data.source={self.config.data.source} have no documents; leave it out"
            raise ConfigError("data.document_mask", True, problem)
        return packed([[begins(number) for number in row] for row in numbers], self.config.train.seq_length)


TASK = TaskKind(
    name="lm",
    about="next-token prediction",
    make=LanguageModeling,
    loss=Figure("loss", "nats/token", 4),
    figures=(Figure("val_bits_per_char", "bits/char", 3),),
)
