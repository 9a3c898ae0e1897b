"""The index of media: what a rank knows of a sample without opening a file, and how it reads one."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from megapar.config.errors import UserError
from megapar.config.schema import ModelConfig
from megapar.config.stacks import MEDIA, TEXT
from megapar.data.media.decode import pixels, sound
from megapar.data.media.files import OpenFiles
from megapar.data.media.read import INDEX, digest_of
from megapar.data.media.samples import AUDIO, IMAGE, MediaSizes
from megapar.data.records import Records, read_manifest
from megapar.data.source import Split


class MediaRecords(Records):
    """Records of a split, of two sequences each (text and target), and the media of each: images, then sounds.

    owners: record that each medium is of, int64 [media], ascending
    kinds: IMAGE or AUDIO, int8 [media]
    extents: int64 [media, 2]: height and width in pixels, or samples and their rate in Hz
    """

    def __init__(self, prefix: str, split: Split) -> None:
        super().__init__(prefix, split)
        with np.load(f"{prefix}{INDEX}", allow_pickle=False) as arrays:
            counts, self._places, self._ends = arrays["counts"], arrays["places"], arrays["ends"]
            begins = np.cumsum(counts) - counts
            counts, begins = counts[self._chosen], begins[self._chosen]
            self._begins = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
            self.owners = np.repeat(np.arange(len(counts)), counts)
            media = np.arange(len(self.owners)) - self._begins[self.owners] + begins[self.owners]
            self.kinds, self.extents = arrays["kinds"][media], arrays["extents"].reshape(-1, 2)[media]
            self._lies = np.stack([arrays[name][media] for name in ("files", "offsets", "sizes")], axis=1)
            self._digests = arrays["digests"][media]
        self._files_of_media = OpenFiles(read_manifest(prefix)["paths"])

    def where(self, record: int) -> str:
        """SHARD:KEY of a record."""
        at = self._chosen[record]
        begin = self._ends[at - 1] if at else 0
        return bytes(self._places[begin : self._ends[at]]).decode("utf-8", "surrogateescape")

    def sizes(self, record: int) -> MediaSizes:
        """Sizes of a record."""
        images, clips = [], []
        for medium in self._of(record):
            first, second = self.extents[medium].tolist()
            if self.kinds[medium] == IMAGE:
                images.append((first, second))
            else:
                clips.append(first)
        text, target = self.lengths[record].tolist()
        return MediaSizes(tuple(images), tuple(clips), text - len(images) - len(clips), target)

    def read_by(self, model: ModelConfig) -> np.ndarray:
        """Which media a model has an encoder for, bool [media]."""
        return np.where(self.kinds == IMAGE, model.image.layers > 0, model.audio.layers > 0)

    def tokens_of_media(self, model: ModelConfig) -> np.ndarray:
        """Tokens that each medium is to a model, int64 [media]; 0 without an encoder for it."""
        first, second = self.extents.T
        of_images = first * second // model.image.patch**2
        of_sounds = np.maximum(1, -(-first // (model.audio.frames * model.audio.hop)))
        return np.where(self.read_by(model), np.where(self.kinds == IMAGE, of_images, of_sounds), 0)

    def tokens(self, model: ModelConfig, modalities: Sequence[str] = (*MEDIA, TEXT)) -> np.ndarray:
        """Tokens of the model's context that each record takes, int64 [records]: of its target all but the last.

        modalities: that are read of it
        """
        text, target = self.lengths.T
        read = np.where(self.kinds == IMAGE, "image" in modalities, "audio" in modalities)
        media = np.bincount(self.owners, self.tokens_of_media(model) * read, len(self)).astype(np.int64)
        marks = np.bincount(self.owners, minlength=len(self))
        return (text - marks) * (TEXT in modalities) + media + np.maximum(target - 1, 0)

    def images(self, record: int, channels: int) -> tuple[np.ndarray, ...]:
        """The images of a record, uint8 [height, width, channels] each. Raises UserError."""
        return tuple(self._decoded(record, IMAGE, lambda data: pixels(data, channels)))

    def clips(self, record: int) -> tuple[np.ndarray, ...]:
        """The sounds of a record, float32 [n] each, in -1..1. Raises UserError."""
        return tuple(self._decoded(record, AUDIO, lambda data: sound(data)[0]))

    def _of(self, record: int) -> range:
        return range(self._begins[record], self._begins[record + 1])

    def _decoded(self, record: int, kind: int, decode: Callable[[bytes], np.ndarray]) -> Iterator[np.ndarray]:
        for medium in self._of(record):
            if self.kinds[medium] != kind:
                continue
            file, offset, size = self._lies[medium].tolist()
            try:
                data = self._files_of_media.read(file, offset, size)
            except OSError as error:
                path = self._files_of_media.paths[file]
                raise UserError(f"{path}: can't be read ({error.strerror}); put it back, or start anew") from None
            if digest_of(data) != self._digests[medium]:
                problem = "has changed since the index of its media was made; stop, and start anew"
                raise UserError(f"{self.where(record)}: {problem}")
            yield decode(data)
