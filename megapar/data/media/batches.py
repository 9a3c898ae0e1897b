"""Samples of images, sound and text as a model reads them.

In a sample's tokens each image and each sound stands as many tokens as its encoder makes of it. Encoders read all
that a micro-batch has of a medium in one row, NAME being `image` or `audio` and T' how many tokens that are:

| entry of a batch        | what                                                                            |
|-------------------------|---------------------------------------------------------------------------------|
| `NAME` [T', ...]        | patches uint8, or samples of sound fp32: for stages that begin with its encoder |
| `NAME_places` [T', k]   | row and column of a patch in its image, or the time of a sound's token          |
| `NAME_starts` [n + 1]   | int32: where each image or sound begins, and the end of the last                |
| `NAME_samples` [T']     | global sample number of each token                                              |
| `NAME_order` [T']       | its place among those of this medium in its sample                              |
| `kinds`, `media` [B, S] | see `models/tokens.py`                                                          |
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megapar.config.model_schema import AudioConfig
from megapar.config.schema import ModelConfig
from megapar.config.stacks import MEDIA, PLACES, media, medium_features
from megapar.data.media.samples import AUDIO, IMAGE, MediaSample

MARKS = {"image": IMAGE, "audio": AUDIO}  # tokens that stand for what encoders read


@dataclass(frozen=True)
class Read:
    """What an encoder reads of an image or a sound. values: [n, ...], of n tokens; places: int64 [n, coordinates]"""

    values: np.ndarray
    places: np.ndarray


@dataclass(frozen=True)
class LaidOut:
    """A sequence whose media stand in full.

    ids, kinds: int64 [n]; an id is 0 where a medium stands
    ends: where each token of the sequence ends, that of a medium in full, int64 [m]
    read: what is read of each medium
    """

    ids: np.ndarray
    kinds: np.ndarray
    ends: np.ndarray
    read: Mapping[str, Sequence[Read]]

    def __len__(self) -> int:
        return len(self.ids)


def lay_out(model: ModelConfig, sample: MediaSample, tokens: np.ndarray) -> LaidOut:
    """A sample's tokens, with MARKS where its images and sounds stand."""
    read = {name: [reading(model, name, one) for one in sample.of(name)] for name in media(model)}
    sizes = {MARKS[name]: iter([len(one.places) for one in every]) for name, every in read.items()}
    ends = np.cumsum([next(sizes[token]) if token in sizes else 1 for token in tokens.tolist()], dtype=np.int64)
    laid = np.repeat(tokens, np.diff(ends, prepend=0))
    kinds = np.zeros_like(laid)
    for kind, name in enumerate(MEDIA, 1):
        kinds[laid == MARKS[name]] = kind
    return LaidOut(np.maximum(laid, 0), kinds, ends, read)


def reading(model: ModelConfig, name: str, one: np.ndarray) -> Read:
    """Of an image uint8 [height, width, channels], or a sound fp32 [samples]."""
    return patches(one, model.image.patch) if name == "image" else windows(one, model.audio)


def patches(image: np.ndarray, size: int) -> Read:
    """uint8 [n, size * size * channels], row by row."""
    rows, columns = image.shape[0] // size, image.shape[1] // size
    cut = image.reshape(rows, size, columns, size, -1).swapaxes(1, 2)
    return Read(cut.reshape(rows * columns, -1), np.indices((rows, columns)).reshape(2, -1).T)


def windows(clip: np.ndarray, audio: AudioConfig) -> Read:
    """fp32 [n, audio.samples], with silence behind the end."""
    count, step = audio.tokens(len(clip)), audio.frames * audio.hop
    padded = np.zeros((count - 1) * step + audio.samples, dtype=np.float32)
    padded[: len(clip)] = clip[: len(padded)]
    cut = np.lib.stride_tricks.sliding_window_view(padded, audio.samples)[::step]
    return Read(cut, np.arange(count).reshape(-1, 1))


class Rows:
    """All that a micro-batch has of each medium, in one row each.

    granule: what their tokens are padded to a multiple of
    read: the media of which what is read is kept
    """

    def __init__(self, model: ModelConfig, read: Collection[str], granule: int = 1) -> None:
        self._rows = {name: _Row(_nothing(model, name), granule, name in read) for name in media(model)}

    def add(self, number: int, laid: LaidOut) -> np.ndarray:
        """Those of sample `number`. Returns `media` of its tokens, int64 [n]."""
        which = np.zeros_like(laid.kinds)
        for kind, name in enumerate(MEDIA, 1):
            if name in self._rows:
                here = np.flatnonzero(laid.kinds == kind)
                which[here] = self._rows[name].count + np.arange(len(here))
                self._rows[name].add(number, laid.read[name])
        return which

    def arrays(self) -> dict[str, np.ndarray]:
        """The entries of a batch, but for `kinds` and `media`."""
        return {f"{name}{ending}": one for name, row in self._rows.items() for ending, one in row.arrays().items()}


def _nothing(model: ModelConfig, name: str) -> Read:
    places = np.zeros((0, PLACES[name]), dtype=np.int64)
    if name == "image":
        return Read(np.zeros((0, medium_features(model, name)), dtype=np.uint8), places)
    return Read(np.zeros((0, model.audio.samples), dtype=np.float32), places)


class _Row:
    def __init__(self, nothing: Read, granule: int, keeps: bool) -> None:
        self.granule, self.keeps, self.count, self._starts = granule, keeps, 0, [0]
        self._read = [nothing]
        self._samples, self._order = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]

    def add(self, number: int, found: Sequence[Read]) -> None:
        before = self.count
        for one in found:
            self._read.append(one)
            self.count += len(one.places)
            self._starts.append(self.count)
        self._samples.append(np.full(self.count - before, number))
        self._order.append(np.arange(self.count - before))

    def arrays(self) -> dict[str, np.ndarray]:
        """The entries, by what follows the medium's name. Padding is a sequence of its own, and has no place in one."""
        missing = -self.count % self.granule
        starts = [*self._starts, *([self.count + missing] if missing else [])]
        parts = {"_samples": self._samples, "_order": self._order, "_places": [one.places for one in self._read]}
        if self.keeps:
            parts[""] = [one.values for one in self._read]
        whole = {name: np.concatenate(every) for name, every in parts.items()}
        if missing:
            whole = {
                name: np.concatenate([one, np.zeros_like(one[:1]).repeat(missing, 0)]) for name, one in whole.items()
            }
            whole["_order"][self.count :] = -1
        return whole | {"_starts": np.array(starts, dtype=np.int32)}
