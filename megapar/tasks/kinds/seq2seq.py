"""Sequence to sequence: next-token prediction of a target, whose source an encoder has read (Sutskever et al. 2014)."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megapar.data.source import Split
from megapar.pipeline.stage import Batch, Tensors
from megapar.tasks.kind import Figure, TaskKind
from megapar.tasks.sampled import IGNORED, SampledTask, ignore, packed


class SequenceToSequence(SampledTask):
    """A pair to a sample, with padding behind source and target that nothing of them sees. Losses are in nats per token
    of a target, all targets of a step alike."""

    def arrays(self, split: Split, numbers: np.ndarray, counted: np.ndarray | None) -> dict[str, np.ndarray]:
        pairs, train, shape = self.samples[split].batch(numbers.reshape(-1)), self.config.train, numbers.shape
        sources, targets = zip(*pairs, strict=True)
        start = self.config.model.encoder.start
        shifted = [np.concatenate([[start], target[:-1]]) for target in targets]
        assert train.source_length is not None
        source = _padded(sources, train.source_length, 0)
        arrays = {"source": source.reshape(*shape, train.source_length)}
        arrays |= {f"source_{name}": value for name, value in _starts(sources, shape, train.source_length).items()}
        labels = _padded(targets, train.seq_length, IGNORED).reshape(*shape, train.seq_length)
        arrays["ids"] = _padded(shifted, train.seq_length, 0).reshape(*shape, train.seq_length)
        return arrays | {"labels": ignore(labels, counted)} | _starts(targets, shape, train.seq_length)

    def count(self, split: Split, numbers: np.ndarray) -> int:
        return self.samples[split].count(numbers)

    def loss(self, outputs: Tensors, batch: Batch) -> Tensor:
        return self.token_losses(outputs, batch).sum(dtype=torch.float64) / batch["count"]

    def figures(self, measured: Sequence[float]) -> dict[str, float | None]:
        return {}


def _padded(rows: Sequence[np.ndarray], length: int, value: int) -> np.ndarray:
    """int64 [rows, length], with a value behind each row's end."""
    found = np.full((len(rows), length), value, dtype=np.int64)
    for row, tokens in zip(found, rows, strict=True):
        row[: len(tokens)] = tokens
    return found


def _starts(rows: Sequence[np.ndarray], shape: tuple[int, ...], length: int) -> dict[str, np.ndarray]:
    """See `packed`: two sequences of every sample, its tokens and its padding: a source has as many as its target."""
    begins = [np.array([0, len(tokens)]) for tokens in rows]
    return packed([begins[first : first + shape[1]] for first in range(0, len(rows), shape[1])], length)


TASK = TaskKind(
    name="seq2seq",
    about="targets of sources",
    make=SequenceToSequence,
    loss=Figure("loss", "nats/token", 4),
)
