"""Supervised fine-tuning: next-token prediction of responses alone, each behind its prompt."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megapar.data.source import Split
from megapar.pipeline.stage import Batch, Tensors
from megapar.tasks.kind import Figure, TaskKind
from megapar.tasks.sampled import IGNORED, SampledTask, ignore, packed


class FineTuning(SampledTask):
    """Rows of packed instructions. An instruction sees itself alone, from position 0 on; only responses are predicted.

    Losses are in nats per token of a response, all responses of a step alike.
    """

    def arrays(self, split: Split, numbers: np.ndarray, counted: np.ndarray | None) -> dict[str, np.ndarray]:
        rows = self.samples[split].batch(numbers.reshape(-1))
        return laid_out(rows, numbers.shape, self.config.train.seq_length, counted)

    def count(self, split: Split, numbers: np.ndarray) -> int:
        return self.samples[split].count(numbers)

    def loss(self, outputs: Tensors, batch: Batch) -> Tensor:
        return self.token_losses(outputs, batch).sum(dtype=torch.float64) / batch["count"]

    def figures(self, measured: Sequence[float]) -> dict[str, float | None]:
        return {}


def laid_out(
    rows: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]],
    shape: tuple[int, ...],
    length: int,
    counted: np.ndarray | None,
) -> dict[str, np.ndarray]:
    """Rows of sequences (tokens, which are learned) as samples [M, B] of `length` tokens, with padding behind them.

    ids, labels int64 [M, B, S]; starts and positions, see `packed`: padding is a sequence of its own.
    """
    ids = np.zeros((len(rows), length), dtype=np.int64)
    labels = np.full((len(rows), length), IGNORED, dtype=np.int64)
    begins = []
    for row, label, sequences in zip(ids, labels, rows, strict=True):
        at, starts = 0, []
        for tokens, learned in sequences:
            stop = at + len(tokens) - 1
            row[at:stop] = tokens[:-1]
            label[at:stop] = np.where(learned[1:], tokens[1:], IGNORED)
            starts.append(at)
            at = stop
        begins.append(np.array([*starts, *([at] if at < length else [])]))
    batches = [begins[first : first + shape[1]] for first in range(0, len(rows), shape[1])]
    arrays = {"ids": ids.reshape(*shape, length), "labels": ignore(labels.reshape(*shape, length), counted)}
    return arrays | packed(batches, length)


TASK = TaskKind(
    name="sft",
    about="responses to prompts",
    make=FineTuning,
    loss=Figure("loss", "nats/token", 4),
)
