"""Images, sounds and text, from shards as WebDataset has them (tar), or from loose files."""

from collections.abc import Callable, Iterable

import numpy as np

from megapar.config.errors import ConfigError, UserError
from megapar.config.schema import DataConfig, TrainConfig
from megapar.data.media.index import MediaRecords
from megapar.data.media.read import KIND, media_origin
from megapar.data.media.samples import IMAGE, MediaSample, MediaSizes
from megapar.data.order import SampleOrder
from megapar.data.records import prepare_from, read_manifest, refuse_too_few
from megapar.data.source import Prepared, Source, Split


class Media:
    """Samples of images, sounds and text. "train" shuffles every epoch anew.

    labels: names of the classes, in the order of their numbers; empty without
    left_out: one line on samples that the model can't use, which `data.on_error=skip` left out; empty without
    """

    def __init__(self, config: TrainConfig, split: Split) -> None:
        assert config.data.prefix is not None
        self.records, self._channels = MediaRecords(config.data.prefix, split), _channels(config)
        refuse_too_few(self.records, split, config.data)
        self.labels = self.records.labels
        classes = config.model.classes
        if classes is not None and classes != len(self.labels):
            problem = f"the data has {len(self.labels)} labels; leave model.classes out, or set it to that"
            raise ConfigError("model.classes", classes, problem)
        self._chosen, self.left_out = _usable(self.records, config)
        self.num_samples = len(self._chosen)
        self.order = SampleOrder(self.num_samples, config.train.seed, shuffle=split == "train")

    def batch(self, indices: Iterable[int]) -> list[MediaSample]:
        """Samples by number. Raises UserError where a file is gone or has changed."""
        return [self._sample(self._record(index)) for index in indices]

    def sizes(self, index: int) -> MediaSizes:
        """Sizes of a sample, without opening a file."""
        return self.records.sizes(self._record(index))

    def _record(self, index: int) -> int:
        return int(self._chosen[self.order.item(int(index))])

    def _sample(self, record: int) -> MediaSample:
        text, target = (np.asarray(self.records.sequence(record, number)[0]) for number in range(2))
        images, clips = self.records.images(record, self._channels), self.records.clips(record)
        return MediaSample(images, clips, text, target, int(self.records.classes[record]))


def _usable(records: MediaRecords, config: TrainConfig) -> tuple[np.ndarray, str]:
    """Numbers of the records whose media the model can take, int64 [n], and a line on the others. Raises UserError."""
    patch, rate = _patch(config), _rate(config)
    image, extents = records.kinds == IMAGE, records.extents
    wrong = np.where(image, (extents % patch).any(axis=1), extents[:, 1] != rate)
    if not wrong.any():
        return np.arange(len(records)), ""
    first = int(np.flatnonzero(wrong)[0])
    one, two = extents[first].tolist()
    if image[first]:
        problem = f"an image of {one} x {two} pixels (height x width), not multiples of model.image.patch={patch}"
        remedy = "resize or pad it"
    else:
        problem, remedy = f"a sound of {two} Hz, where model.audio.rate={rate}", "resample it"
    unusable = np.zeros(len(records), dtype=bool)
    unusable[records.owners[wrong]] = True
    line = f"{records.where(int(records.owners[first]))}: {problem}; {remedy}"
    if config.data.on_error == "refuse":
        raise UserError(f"{line}, or use data.on_error=skip")
    if unusable.all():
        raise UserError(f"{line}, as no other sample can be used")
    count = f"{int(unusable.sum()):,} of {len(records):,} samples can't be used and are left out"
    return np.flatnonzero(~unusable), f"{count}, the first: {line}"


def _channels(config: TrainConfig) -> int:
    channels: int = getattr(getattr(config.model, "image", None), "channels", 3)
    if channels not in (1, 3):
        raise ConfigError("model.image.channels", channels, "images have 1 (grey) or 3 (RGB); use one of them")
    return channels


def _patch(config: TrainConfig) -> int:
    patch: int = getattr(getattr(config.model, "image", None), "patch", 16)
    return patch


def _rate(config: TrainConfig) -> int:
    rate: int = getattr(getattr(config.model, "audio", None), "rate", 16000)
    return rate


def _prepare(config: DataConfig, say: Callable[[str], None]) -> Prepared:
    origin = media_origin(config, say)
    prepared = prepare_from(origin, KIND, config, say)
    left_out = read_manifest(prepared.prefix)["left_out"]
    if left_out["count"] and config.on_error == "refuse":  # an earlier run made the index without them
        raise UserError(f"{left_out['first']}, or use data.on_error=skip")
    if left_out["count"]:
        count = f"{left_out['count']:,} of {left_out['samples']:,} samples are left out"
        say(f"data: {origin.name}: {count}, the first: {left_out['first']}")
    return prepared


SOURCE = Source("media", "images, sounds and text, from tar shards or loose files", _prepare, Media)
