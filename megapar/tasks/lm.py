"""Next-token prediction.

A batch is a dict of tensors. The model reads `ids`, `samples` and `step` of it (`megapar.models.tokens`); what else is
in it is the task's own business.
"""

import math

import numpy as np
import torch
from torch import Tensor

from megapar.config.errors import ConfigError
from megapar.config.schema import TrainConfig
from megapar.data.source import Samples, Split, find_source
from megapar.parallel.context import StageContext
from megapar.parallel.cross_entropy import vocab_parallel_cross_entropy
from megapar.pipeline.stage import Batch, Stage
from megapar.tasks.kind import Figure, TaskKind
from megapar.tasks.send import send

_IGNORED = -1  # label of a token that does not count


class LanguageModeling:
    """Next-token prediction on windows of a token file.

    Losses are in nats per token: every micro-batch's sum is divided by the number of tokens in the global batch, which
    is known beforehand, so sums over micro-batches and ranks need no further scaling.
    """

    def __init__(self, config: TrainConfig, context: StageContext, last: Stage | None) -> None:
        self.config, self.context, self.mesh = config, context, context.mesh
        head = getattr(last, "head", None)
        self.first_id = 0 if head is None else head.first_id
        source = find_source(config.data.source)
        self._samples: dict[str, Samples] = {
            split: source.open(config, split)
            for split in (("train", "valid") if config.train.eval_every else ("train",))
        }
        self.tokens_per_step = config.train.global_batch_size * config.train.seq_length

    def batches(self, step: int) -> list[Batch]:
        """This data-parallel rank's micro-batches of step 1, 2, ...: its share of a run of global sample numbers."""
        first = (step - 1) * self.config.train.global_batch_size
        numbers = first + self._share(self.config.train.global_batch_size)
        return self._batches("train", numbers, step, self.tokens_per_step)

    def loss(self, outputs: dict[str, Tensor], batch: Batch) -> Tensor:
        """This micro-batch's part of the mean loss over the global batch."""
        labels, tp = batch["labels"].reshape(-1), self.context.tp
        losses = vocab_parallel_cross_entropy(outputs["logits"], labels, self.first_id, tp, ignored=_IGNORED)
        # The sum is fp64: a rank that sums other tokens should not lose other digits.
        return losses.sum(dtype=torch.float64) / batch["tokens"]

    def validation(self) -> list[Batch]:
        """This data-parallel rank's share of the held-out samples.

        The samples are the same in every layout; where they don't divide, some batches hold tokens that don't count.
        """
        numbers = self._held_out_numbers()
        granule = self.config.train.micro_batch_size * self.mesh.samples.size
        share = self._share(-(-len(numbers) // granule) * granule)
        tokens = len(numbers) * self.config.train.seq_length
        counted = share < len(numbers)
        return self._batches("valid", numbers[np.minimum(share, len(numbers) - 1)], 0, tokens, counted)

    def figures(self, loss: float) -> dict[str, float | None]:
        """Bits per character: compression of the held-out text, comparable between tokenizers; None for tokens of
        unknown origin, or that stand for no character (ends of documents)."""
        held_out = self._samples["valid"]
        counts = getattr(held_out, "char_counts", None)
        if counts is None:
            return {"val_bits_per_char": None}
        labels = held_out.batch(self._held_out_numbers())[:, 1:]
        characters = int(counts[labels].sum(dtype=np.int64))
        return {"val_bits_per_char": loss * labels.size / characters / math.log(2) if characters else None}

    def _held_out_numbers(self) -> np.ndarray:
        """The samples of an evaluation, spread evenly over the held-out documents."""
        available = self._samples["valid"].num_samples
        count = min(self.config.train.eval_samples, available)
        return np.arange(count) * available // count

    def _documents(self, split: Split, numbers: np.ndarray) -> dict[str, np.ndarray]:
        samples = self._samples[split]
        begins = getattr(samples, "begins", None)
        if begins is None:
            problem = f"samples of data.source={self.config.data.source} have no documents; leave it out"
            raise ConfigError("data.document_mask", True, problem)
        return packed([[begins(number) for number in row] for row in numbers], self.config.train.seq_length)

    def _share(self, samples: int) -> np.ndarray:
        """[M, B]: of sample numbers 0..samples-1 this rank's micro-batches, dealt out micro-batch by micro-batch."""
        size, peers = self.config.train.micro_batch_size, self.mesh.samples
        return np.arange(samples).reshape(-1, peers.size, size)[:, peers.index]

    def _batches(
        self, split: Split, numbers: np.ndarray, step: int, tokens: int, counted: np.ndarray | None = None
    ) -> list[Batch]:
        """Of sample numbers [M, B]. tokens: of the whole batch; counted [M, B]: samples that are part of the loss."""
        windows = self._samples[split].batch(numbers.reshape(-1)).reshape(*numbers.shape, -1)
        labels = windows[..., 1:] if counted is None else np.where(counted[..., None], windows[..., 1:], _IGNORED)
        arrays = {"ids": windows[..., :-1], "labels": labels, "samples": numbers}
        if self.config.data.document_mask:
            arrays |= self._documents(split, numbers)
        # Numbers of the host, which no kernel waits for.
        scalars = {"step": torch.tensor(step), "tokens": torch.tensor(float(tokens), dtype=torch.float64)}
        return [batch | scalars for batch in send(arrays, self.mesh.device)]


def packed(begins: list[list[np.ndarray]], length: int) -> dict[str, np.ndarray]:
    """starts int32 [M, sequences + 1] and positions int64 [M, B, S] from where the documents of M micro-batches of B
    samples of S tokens begin. Of fewer sequences than others have the last ones are empty; how many that are is a power
    of two, so that few shapes occur."""
    found = [np.concatenate([first + number * length for number, first in enumerate(batch)]) for batch in begins]
    tokens = len(begins[0]) * length
    most = 1 << max(len(starts) for starts in found).bit_length()
    padded = np.full((len(found), most + 1), tokens, dtype=np.int32)
    positions = np.empty((len(found), tokens), dtype=np.int64)
    for row, place, starts in zip(padded, positions, found, strict=True):
        row[: len(starts)] = starts
        place[:] = np.arange(tokens) - np.repeat(starts, np.diff(np.append(starts, tokens)))
    return {"starts": padded, "positions": positions.reshape(len(found), -1, length)}


TASK = TaskKind(
    name="lm",
    about="next-token prediction",
    make=LanguageModeling,
    loss=Figure("loss", "nats/token", 4),
    figures=(Figure("val_bits_per_char", "bits/char", 3),),
)
