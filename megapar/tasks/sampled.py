"""A task on samples that have numbers: which of them a step takes, and which of those this rank."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from heapq import heappop, heappush
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megapar.config.schema import TrainConfig
from megapar.data.source import Split, find_source
from megapar.parallel.context import StageContext
from megapar.parallel.cross_entropy import vocab_parallel_cross_entropy
from megapar.pipeline.stage import Batch, Stage, Tensors
from megapar.tasks.send import send

IGNORED = -1  # label of a token, or of a sample, that does not count


class SampledTask(ABC):
    """Batches of numbered samples. A step's loss is a sum over what its samples count, divided by how many those are.

    A task says what is in a batch of samples (`arrays`), how many it counts (`count`), and the loss of a micro-batch,
    whose sum it divides by `batch["count"]`.
    """

    num_measures = 1

    def __init__(self, config: TrainConfig, context: StageContext, stages: Mapping[int, Stage]) -> None:
        self.config, self.context, self.mesh = config, context, context.mesh
        head = getattr(stages.get(len(context.placement) - 1), "head", None)
        self.first_id = getattr(head, "first_id", 0)
        source = find_source(config.data.source)
        splits: tuple[Split, ...] = ("train", "valid") if config.train.eval_every else ("train",)
        self.samples: dict[Split, Any] = {split: source.open(config, split) for split in splits}
        self.tokens_per_step = config.train.global_batch_size * config.train.seq_length

    @abstractmethod
    def arrays(self, split: Split, numbers: np.ndarray, counted: np.ndarray | None) -> dict[str, np.ndarray]:
        """What the model and the loss read of samples [M, B], as arrays [M, ...]; the numbers themselves apart.

        counted: bool [M, B], samples that are part of the loss; None: all are
        """

    @abstractmethod
    def count(self, split: Split, numbers: np.ndarray) -> int:
        """What the loss of samples [n] is a mean over: tokens, or samples."""

    @abstractmethod
    def loss(self, outputs: Tensors, batch: Batch) -> Tensor:
        """This micro-batch's part of the mean over the global batch: its sum, in fp64, by `batch["count"]`."""

    def costs(self, split: Split, numbers: np.ndarray) -> np.ndarray | None:
        """What samples [n] cost beyond what all do alike, in FLOPs, [n]; None: they all cost the same."""
        return None

    def measure(self, outputs: Tensors, batch: Batch) -> Tensor:
        """[k] fp64: a micro-batch's part of the loss, then of what else an evaluation measures."""
        return self.loss(outputs, batch).reshape(1)

    def batches(self, step: int) -> list[Batch]:
        """This data-parallel rank's micro-batches of step 1, 2, ...: its share of a run of global sample numbers.

        With `data.balance` samples are dealt out so that micro-batches cost about the same: a loss is a sum over the
        step's samples, so it stays what it is.
        """
        size = self.config.train.global_batch_size
        numbers = (step - 1) * size + np.arange(size)
        if self.config.data.balance and (costs := self.costs("train", numbers)) is not None:
            numbers = numbers[evenly(costs, size // self.config.train.micro_batch_size)]
        return self._batches("train", numbers[self._share(size)], step, self.count("train", numbers))

    def examples(self) -> list[Batch]:
        return self.batches(1)[:2]

    def step_figures(self) -> Mapping[str, float]:
        return {}

    def validation(self) -> list[Batch]:
        """This data-parallel rank's share of the held-out samples.

        The samples are the same in every layout; where they don't divide, some batches hold samples that don't count.
        """
        numbers = self.held_out_numbers()
        granule = self.config.train.micro_batch_size * self.mesh.samples.size
        share = self._share(-(-len(numbers) // granule) * granule)
        chosen, counted = numbers[np.minimum(share, len(numbers) - 1)], share < len(numbers)
        return self._batches("valid", chosen, 0, self.count("valid", numbers), counted)

    def held_out_numbers(self) -> np.ndarray:
        """The samples of an evaluation, spread evenly over those that there are."""
        available = self.samples["valid"].num_samples
        count = min(self.config.train.eval_samples, available)
        return np.arange(count) * available // count

    def token_losses(self, outputs: Tensors, batch: Batch) -> Tensor:
        """Negative log likelihood of `batch["labels"]`, [T] in nats; 0 where they are `IGNORED`."""
        labels = batch["labels"].reshape(-1)
        return vocab_parallel_cross_entropy(outputs["logits"], labels, self.first_id, self.context.tp, ignored=IGNORED)

    def _share(self, samples: int) -> np.ndarray:
        """[M, B]: of sample numbers 0..samples-1 this rank's micro-batches, dealt out micro-batch by micro-batch."""
        size, peers = self.config.train.micro_batch_size, self.mesh.samples
        return np.arange(samples).reshape(-1, peers.size, size)[:, peers.index]

    def _batches(
        self, split: Split, numbers: np.ndarray, step: int, count: int, counted: np.ndarray | None = None
    ) -> list[Batch]:
        """Of sample numbers [M, B]. count: of the whole batch; counted [M, B]: samples that are part of the loss."""
        return self._sent(self.arrays(split, numbers, counted) | {"samples": numbers}, step, count)

    def _sent(self, arrays: dict[str, Any], step: int, count: int) -> list[Batch]:
        # Numbers of the host, which no kernel waits for.
        scalars = {"step": torch.tensor(step), "count": torch.tensor(float(count), dtype=torch.float64)}
        return [batch | scalars for batch in send(arrays, self.mesh.device)]


def evenly(costs: np.ndarray, runs: int) -> np.ndarray:
    """An order of items, int64 [n], whose `runs` runs of the same length cost about the same: the dearest first, each
    into the run that costs least so far and has room (Graham 1969)."""
    room = len(costs) // runs
    chosen: list[list[int]] = [[] for _ in range(runs)]
    heap = [(0.0, run) for run in range(runs)]
    for item in np.argsort(-costs, kind="stable").tolist():
        cost, run = heappop(heap)
        chosen[run].append(item)
        if len(chosen[run]) < room:
            heappush(heap, (cost + float(costs[item]), run))
    return np.array([item for run in chosen for item in run])


def ignore(labels: np.ndarray, counted: np.ndarray | None) -> np.ndarray:
    """Labels [M, B, ...] without those of samples that don't count."""
    if counted is None:
        return labels
    return np.where(counted.reshape(*counted.shape, *[1] * (labels.ndim - counted.ndim)), labels, IGNORED)


def packed(begins: list[list[np.ndarray]], length: int) -> dict[str, np.ndarray]:
    """starts int32 [M, sequences + 1] and positions int64 [M, B, S] from where the sequences of M micro-batches of B
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
