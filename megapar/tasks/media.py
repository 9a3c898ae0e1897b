"""Tasks on samples of images, sound and text: what a micro-batch of them is made of.

In a sample's tokens each image and each sound stands as many tokens as its encoder makes of it. The encoders read all
that a micro-batch has of a medium in one row, NAME being `image` or `audio` and T' how many tokens that are:

| entry                   | what                                                                           |
|-------------------------|--------------------------------------------------------------------------------|
| `NAME` [T', ...]        | patches uint8, or samples of sound fp32: on stages that begin with its encoder |
| `NAME_places` [T', k]   | row and column of a patch in its image, or the time of a sound's token         |
| `NAME_starts` [n + 1]   | int32: where each image or sound begins, and the end of the last               |
| `NAME_samples` [T']     | global sample number of each token                                             |
| `NAME_order` [T']       | its place among those of this medium in its sample                             |
| `kinds`, `media` [B, S] | see `models/tokens.py`                                                         |
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from megapar.config.model_schema import AudioConfig
from megapar.config.schema import TrainConfig
from megapar.config.stacks import MEDIA, PLACES, media, medium_features
from megapar.config.stages import stage_parts
from megapar.data.media.samples import AUDIO, IMAGE, MediaSample
from megapar.data.source import Split
from megapar.parallel.context import StageContext
from megapar.pipeline.stage import Stage
from megapar.tasks.sampled import IGNORED, SampledTask, ignore, packed

TEXT = "text"
MARKS = {"image": IMAGE, "audio": AUDIO}  # tokens that stand for what encoders read


class MediaTask(SampledTask):
    """Samples of images, sound and text, each a sequence, with padding behind it that no token of it sees.

    `task.modalities` says which of them are read. In training each is left out of a sample as often as
    `task.modality_dropout` says, though never all that it has: a function of (seed, sample number).
    """

    def __init__(self, config: TrainConfig, context: StageContext, last: Stage | None) -> None:
        super().__init__(config, context, last)
        self.modalities = config.task.modalities or [*media(config.model), TEXT]
        self.granule = context.tp.size if context.splits_tokens else 1
        rank = context.mesh["pp"].index
        stages = zip(stage_parts(config), context.placement, strict=True)
        mine = {part.name for stage, place in stages if place == rank for part in stage}
        self.read = frozenset(name for name in media(config.model) if f"{name}.embedding" in mine)

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
        there = [name for name in self.modalities if sample.has(name)]
        rate = self.config.task.modality_dropout
        if split == "train" and rate and len(there) > 1:
            random = np.random.Generator(np.random.Philox(key=self.config.train.seed, counter=number))
            draws = random.random(len(there))
            there = [name for name, draw in zip(there, draws, strict=True) if draw >= min(rate, draws.max())]
        return sample.only(there)

    def _micro_batch(self, samples: Sequence[MediaSample], numbers: np.ndarray) -> dict[str, np.ndarray]:
        """Of samples [B] and their numbers, without `starts` and `positions`."""
        shape = len(samples), self.config.train.seq_length
        ids, kinds, which = (np.zeros(shape, dtype=np.int64) for _ in range(3))
        labels, lengths = np.full(shape, IGNORED, dtype=np.int64), np.zeros(len(samples), dtype=np.int64)
        rows = {name: _Row(self._nothing(name), self.granule) for name in media(self.config.model)}
        for at, (sample, number) in enumerate(zip(samples, numbers.tolist(), strict=True)):
            found = {name: [self._tokens(name, one) for one in sample.of(name)] for name in rows}
            sizes = {MARKS[name]: iter([len(places) for _, places in every]) for name, every in found.items()}
            tokens, of_tokens = self.sequence(sample)
            repeats = [next(sizes[token]) if token in sizes else 1 for token in tokens.tolist()]
            end = lengths[at] = sum(repeats)
            assert end <= shape[1], f"sample {number} has {end} tokens"
            laid = np.repeat(tokens, repeats)
            ids[at, :end] = np.maximum(laid, 0)
            labels[at, np.cumsum(repeats) - 1] = of_tokens
            for kind, name in enumerate(MEDIA, 1):
                if name in rows:
                    here = np.flatnonzero(laid == MARKS[name])
                    kinds[at, here], which[at, here] = kind, rows[name].count + np.arange(len(here))
                    rows[name].add(number, found[name])
        parts = {"ids": ids, "kinds": kinds, "media": which, "lengths": lengths, "labels": self.labels(samples, labels)}
        for name, row in rows.items():
            parts |= {f"{name}{ending}": array for ending, array in row.arrays(name in self.read).items()}
        return parts

    def _nothing(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """`_tokens` of none."""
        model, places = self.config.model, np.zeros((0, PLACES[name]), dtype=np.int64)
        if name == "image":
            return np.zeros((0, medium_features(model, name)), dtype=np.uint8), places
        return np.zeros((0, model.audio.samples), dtype=np.float32), places

    def _tokens(self, name: str, one: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of an image or a sound (what an encoder reads for each token [n, ...]; where each stands [n, coordinates])."""
        model = self.config.model
        return patches(one, model.image.patch) if name == "image" else windows(one, model.audio)


class _Row:
    """What a micro-batch has of a medium, in one row. nothing: of no token; granule: what tokens are padded to a
    multiple of"""

    def __init__(self, nothing: tuple[np.ndarray, np.ndarray], granule: int) -> None:
        self.granule, self.count, self._starts = granule, 0, [0]
        self._values, self._places = [nothing[0]], [nothing[1]]
        self._samples, self._order = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]

    def add(self, number: int, found: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        """All that sample `number` has."""
        before = self.count
        for values, places in found:
            self._values.append(values)
            self._places.append(places)
            self.count += len(places)
            self._starts.append(self.count)
        self._samples.append(np.full(self.count - before, number))
        self._order.append(np.arange(self.count - before))

    def arrays(self, read: bool) -> dict[str, np.ndarray]:
        """The entries of the batch, by what follows their name. read: what encoders read, too"""
        missing = -self.count % self.granule
        starts = [*self._starts, *([self.count + missing] if missing else [])]
        parts = {"_samples": self._samples, "_order": self._order, "_places": self._places}
        if read:
            parts[""] = self._values
        whole = {name: np.concatenate(every) for name, every in parts.items()}
        if missing:
            whole = {
                name: np.concatenate([one, np.zeros_like(one[:1].repeat(missing, 0))]) for name, one in whole.items()
            }
        return whole | {"_starts": np.array(starts, dtype=np.int32)}


def patches(image: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [height, width, channels] to (patches, row by row, uint8 [n, size * size * channels]; their rows and
    columns, int64 [n, 2])."""
    rows, columns = image.shape[0] // size, image.shape[1] // size
    cut = image.reshape(rows, size, columns, size, -1).swapaxes(1, 2)
    return cut.reshape(rows * columns, -1), np.indices((rows, columns)).reshape(2, -1).T


def windows(clip: np.ndarray, audio: AudioConfig) -> tuple[np.ndarray, np.ndarray]:
    """A sound fp32 [n] to (what its tokens read, fp32 [tokens, audio.samples]; their numbers, int64 [tokens, 1]), with
    silence behind its end."""
    count, step = audio.tokens(len(clip)), audio.frames * audio.hop
    padded = np.zeros((count - 1) * step + audio.samples, dtype=np.float32)
    padded[: len(clip)] = clip[: len(padded)]
    cut = np.lib.stride_tricks.sliding_window_view(padded, audio.samples)[::step]
    return cut, np.arange(count).reshape(-1, 1)
