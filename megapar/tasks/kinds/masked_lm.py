"""Masked language modelling (Devlin et al. 2019, section 3.1): tokens hidden from the model are predicted."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from megapar.config.errors import ConfigError
from megapar.config.schema import TrainConfig
from megapar.data.source import Split
from megapar.data.tokenizer import open_tokenizer
from megapar.data.tokenizer.files import tokenizer_beside
from megapar.parallel.context import StageContext
from megapar.parallel.cross_entropy import vocab_parallel_argmax
from megapar.pipeline.stage import Batch, Stage, Tensors
from megapar.tasks.kind import Figure, TaskKind
from megapar.tasks.kinds.lm import LanguageModeling
from megapar.tasks.sampled import IGNORED, ignore

MASKED, RANDOM = 0.8, 0.1  # of the chosen tokens; the rest stay as they are


class MaskedLanguageModeling(LanguageModeling):
    """Of every sample `task.mask_share` of the tokens, at least one, are predicted: 80% of them are replaced by the
    mask token, 10% by a random one, 10% stay. Which, is a function of (seed, split, sample number), so it changes with
    every epoch and not with the layout. Losses are in nats per predicted token.
    """

    def __init__(self, config: TrainConfig, context: StageContext, stages: Mapping[int, Stage]) -> None:
        super().__init__(config, context, stages)
        assert config.model.vocab_size is not None
        self.mask, self.tokens = mask_token(config), config.model.vocab_size
        self.chosen = max(1, round(config.task.mask_share * config.train.seq_length))

    def arrays(self, split: Split, numbers: np.ndarray, counted: np.ndarray | None) -> dict[str, np.ndarray]:
        windows = self.samples[split].batch(numbers.reshape(-1))[:, :-1]
        found = [self._hide(ids, split, int(number)) for ids, number in zip(windows, numbers.flat, strict=True)]
        ids, labels = (np.stack(part).reshape(*numbers.shape, -1) for part in zip(*found, strict=True))
        return {"ids": ids, "labels": ignore(labels, counted)} | self.documents(split, numbers)

    def count(self, split: Split, numbers: np.ndarray) -> int:
        return len(numbers) * self.chosen

    def figures(self, measured: Sequence[float]) -> dict[str, float | None]:
        return {"val_accuracy": measured[1]}

    num_measures = 2

    def measure(self, outputs: Tensors, batch: Batch) -> Tensor:
        """The loss, and the share of tokens that are the likeliest where they stand."""
        labels = batch["labels"].reshape(-1)
        best = vocab_parallel_argmax(outputs["logits"], self.first_id, self.context.tp)
        correct = ((best == labels) & (labels != IGNORED)).sum(dtype=torch.float64) / batch["count"]
        return torch.stack([self.loss(outputs, batch), correct])

    def _hide(self, ids: np.ndarray, split: Split, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids as the model reads them, labels) of a sample."""
        key = self.config.train.seed * 2 + (split == "valid")
        random = np.random.Generator(np.random.Philox(key=key, counter=number))
        places = random.permutation(len(ids))[: self.chosen]
        kinds, others = random.random(self.chosen), random.integers(self.tokens, size=self.chosen)
        hidden, labels = ids.copy(), np.full_like(ids, IGNORED)
        labels[places] = ids[places]
        hidden[places] = np.where(kinds < MASKED, self.mask, np.where(kinds < MASKED + RANDOM, others, ids[places]))
        return hidden, labels


def mask_token(config: TrainConfig) -> int:
    """The token that hides others. Raises ConfigError where the data's tokenizer has none."""
    path = tokenizer_beside(config.data.prefix)
    found = None if path is None else open_tokenizer(path).mask
    if found is None:
        problem = "has no token to hide others with; use a tokenizer with a mask_token, or bpe"
        raise ConfigError("data.tokenizer", path or config.data.tokenizer, problem)
    return found


TASK = TaskKind(
    name="masked_lm",
    about="tokens hidden from the model",
    make=MaskedLanguageModeling,
    loss=Figure("loss", "nats/token", 4),
    figures=(Figure("val_accuracy", "of hidden tokens found", 3),),
)
