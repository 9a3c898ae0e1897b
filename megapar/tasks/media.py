"""Tasks on samples of images, sound and text (`data/media/batches.py`)."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any

import numpy as np

from megapar.config.model import medium_flops
from megapar.config.schema import TrainConfig
from megapar.config.stacks import TEXT, media
from megapar.config.stages import stage_parts
from megapar.data.media.batches import Rows, lay_out
from megapar.data.media.samples import MediaSample
from megapar.data.source import Split
from megapar.parallel.context import StageContext
from megapar.pipeline.stage import Stage
from megapar.tasks.sampled import IGNORED, SampledTask, ignore, packed


class MediaTask(SampledTask):
    """Samples of images, sound and text, each a sequence, with padding behind it that no token of it sees.

    `task.modalities` says which of them are read. In training each is left out of a sample as often as
    `task.modality_dropout` says, though never all that it has: a function of (seed, sample number).
    """

    def __init__(self, config: TrainConfig, context: StageContext, stages: Mapping[int, Stage]) -> None:
        super().__init__(config, context, stages)
        self.modalities = config.task.modalities or [*media(config.model), TEXT]
        self.granule = context.tp.size if context.splits_tokens else 1
        self.read = media_read_here(config, context)
        self._flops = cache(partial(medium_flops, config.model))  # of a medium, and its tokens: a few, asked for often

    @abstractmethod
    def sequence(self, sample: MediaSample) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, with MARKS for media; labels of each), int64 [n] both."""

    def labels(self, samples: Sequence[MediaSample], of_tokens: np.ndarray) -> np.ndarray:
        """Those that the loss reads. of_tokens: int64 [B, S]"""
        return of_tokens

    def arrays(self, split: Split, numbers: np.ndarray, counted: np.ndarray | None) -> dict[str, Any]:
        found = self.samples[split].batch(numbers.reshape(-1), self.read)
        samples = [self.kept(split, int(number), one) for number, one in zip(numbers.flat, found, strict=True)]
        size, length = numbers.shape[1], self.config.train.seq_length
        batches = [self._micro_batch(samples[m * size : (m + 1) * size], row) for m, row in enumerate(numbers)]
        arrays: dict[str, Any] = {name: [batch[name] for batch in batches] for name in batches[0]}
        begins = [[np.array([0, *([n] if n < length else [])]) for n in batch["lengths"].tolist()] for batch in batches]
        arrays |= {name: np.stack(arrays[name]) for name in ("ids", "kinds", "media", "labels", "lengths")}
        return arrays | {"labels": ignore(arrays["labels"], counted)} | packed(begins, length)

    def kept(self, split: Split, number: int, sample: MediaSample) -> MediaSample:
        """A sample with those modalities that are read of it."""
        return sample.only(self._kept(split, number, [name for name in self.modalities if sample.has(name)]))

    def costs(self, split: Split, numbers: np.ndarray) -> np.ndarray:
        """What encoders compute. The trunk reads as many tokens of every sample, padding counted."""
        model = self.config.model
        costs = np.zeros(len(numbers))
        for at, number in enumerate(numbers.tolist()):
            sizes = self.samples[split].sizes(number)
            tokens = {
                "image": [height * width // model.image.patch**2 for height, width in sizes.images],
                "audio": [model.audio.tokens(samples) for samples in sizes.clips],
            }
            there = [name for name in self.modalities if (sizes.text if name == TEXT else tokens[name])]
            kept = self._kept(split, number, there)
            costs[at] = sum(self._flops(name, tuple(tokens[name])) for name in kept if name != TEXT)
        return costs

    def _kept(self, split: Split, number: int, there: list[str]) -> list[str]:
        """Of the modalities that a sample has those that are read of it."""
        rate = self.config.task.modality_dropout
        if split != "train" or not rate or len(there) < 2:
            return there
        draws = np.random.Generator(np.random.Philox(key=self.config.train.seed, counter=number)).random(len(there))
        return [name for name, draw in zip(there, draws, strict=True) if draw >= min(rate, draws.max())]

    def _micro_batch(self, samples: Sequence[MediaSample], numbers: np.ndarray) -> dict[str, np.ndarray]:
        """Of samples [B] and their numbers, without `starts` and `positions`."""
        shape = len(samples), self.config.train.seq_length
        ids, kinds, which = (np.zeros(shape, dtype=np.int64) for _ in range(3))
        labels, lengths = np.full(shape, IGNORED, dtype=np.int64), np.zeros(len(samples), dtype=np.int64)
        rows = Rows(self.config.model, self.read, self.granule)
        for at, (sample, number) in enumerate(zip(samples, numbers.tolist(), strict=True)):
            tokens, of_tokens = self.sequence(sample)
            laid = lay_out(self.config.model, sample, tokens)
            end = lengths[at] = len(laid)
            ids[at, :end], kinds[at, :end], which[at, :end] = laid.ids, laid.kinds, rows.add(number, laid)
            labels[at, laid.ends - 1] = of_tokens
        parts = {"ids": ids, "kinds": kinds, "media": which, "lengths": lengths, "labels": self.labels(samples, labels)}
        return parts | rows.arrays()


def media_read_here(config: TrainConfig, context: StageContext) -> frozenset[str]:
    """Those whose encoders begin on a stage of this rank."""
    rank = context.mesh["pp"].index
    stages = zip(stage_parts(config), context.placement, strict=True)
    mine = {part.name for stage, place in stages if place == rank for part in stage}
    return frozenset(name for name in media(config.model) if f"{name}.embedding" in mine)
