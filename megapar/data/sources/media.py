"""Images, sounds and text, from shards as WebDataset has them (tar), or from loose files."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from functools import partial

import numpy as np

from megapar.config.errors import ConfigError, UserError
from megapar.config.schema import DataConfig, ModelConfig, TrainConfig
from megapar.config.stacks import MEDIA, TEXT, media
from megapar.data.media.index import MediaRecords
from megapar.data.media.read import KIND, media_origin
from megapar.data.media.samples import AUDIO, IMAGE, MediaSample, MediaSizes
from megapar.data.order import SampleOrder
from megapar.data.records import fitting, prepare_from, read_manifest, refuse_too_few
from megapar.data.source import Prepared, Source, Split


class Media:
    """Samples of images, sounds and text, of at most `seq_length` tokens. "train" shuffles every epoch anew. Media that
    the model has no encoder for are not read.

    records, chosen: those of the split, and the numbers of those that are used
    labels: names of the classes, in the order of their numbers; empty without
    left_out: one line on samples that the model can't use, which `data.on_error=skip` left out; empty without
    """

    def __init__(self, config: TrainConfig, split: Split) -> None:
        assert config.data.prefix is not None
        self.model, self.records = config.model, MediaRecords(config.data.prefix, split)
        refuse_too_few(self.records, split, config.data)
        self.labels = self.records.labels
        classes = config.model.classes
        if classes is not None and classes != len(self.labels):
            problem = f"the data has {len(self.labels)} labels; leave model.classes out, or set it to that"
            raise ConfigError("model.classes", classes, problem)
        chosen, self.left_out = _usable(self.records, config)
        self.chosen = np.intersect1d(chosen, _fitting(self.records, chosen, config))
        self.num_samples = len(self.chosen)
        self.order = SampleOrder(self.num_samples, config.train.seed, shuffle=split == "train")

    def batch(self, indices: Iterable[int], read: Collection[str] = MEDIA) -> list[MediaSample]:
        """Samples by number. read: media that are; others have the right sizes, and nothing in them. Raises UserError
        where a file is gone or has changed."""
        return [self.sample(self._record(index), read) for index in indices]

    def sizes(self, index: int) -> MediaSizes:
        """Sizes of a sample, without opening a file."""
        return self.records.sizes(self._record(index))

    def count(self, indices: Iterable[int]) -> int:
        """Tokens of the targets of samples."""
        return int(sum(self.records.lengths[self._record(index), 1] for index in indices))

    def _record(self, index: int) -> int:
        return int(self.chosen[self.order.item(int(index))])

    def sample(self, record: int, read: Collection[str] = MEDIA) -> MediaSample:
        """The sample of a record, by its number."""
        text, target = (np.asarray(self.records.sequence(record, number)[0]) for number in range(2))
        label, sizes = int(self.records.classes[record]), self.records.sizes(record)
        there = media(self.model)
        images: tuple[np.ndarray, ...] = ()
        clips: tuple[np.ndarray, ...] = ()
        if "image" in there:
            channels = self.model.image.channels
            images = self.records.images(record, channels) if "image" in read else blank(sizes, channels)
        if "audio" in there:
            clips = self.records.clips(record) if "audio" in read else silent(sizes)
        sample = MediaSample(images, clips, text, target, label)
        return sample if len(there) == len(MEDIA) else sample.only((*there, "text"))


def blank(sizes: MediaSizes, channels: int) -> tuple[np.ndarray, ...]:
    """Images of these sizes, which take no memory."""
    return tuple(np.broadcast_to(np.uint8(0), (*size, channels)) for size in sizes.images)


def silent(sizes: MediaSizes) -> tuple[np.ndarray, ...]:
    """Sounds of these sizes, which take no memory."""
    return tuple(np.broadcast_to(np.float32(0), (size,)) for size in sizes.clips)


def _usable(records: MediaRecords, config: TrainConfig) -> tuple[np.ndarray, str]:
    """Numbers of the records that model and task can take, int64 [n], and a line on the others. Raises UserError."""
    wrong = _problems(records, config)
    unusable = np.any([mask for mask, _ in wrong], axis=0)
    if not unusable.any():
        return np.arange(len(records)), ""
    first = int(np.flatnonzero(unusable)[0])
    problem = next(say(first) for mask, say in wrong if mask[first])
    line = f"{records.where(first)}: {problem}"
    if config.data.on_error == "refuse":
        raise UserError(f"{line}, or use data.on_error=skip")
    if unusable.all():
        raise UserError(f"{line}, as no other sample can be used")
    count = f"{int(unusable.sum()):,} of {len(records):,} samples can't be used and are left out"
    return np.flatnonzero(~unusable), f"{count}, the first: {line}"


def _problems(records: MediaRecords, config: TrainConfig) -> list[tuple[np.ndarray, Callable[[int], str]]]:
    """What can be wrong with a record: which have that, bool [records], and what to say of one, with the remedy."""
    model, image, extents = config.model, records.kinds == IMAGE, records.extents
    patch, rate = model.image.patch, model.audio.rate
    read = records.read_by(model)
    bad = np.where(image, (extents % patch).any(axis=1), extents[:, 1] != rate) & read
    of_bad = _holding(records, bad)

    def of_medium(record: int) -> str:
        medium = int(np.flatnonzero(bad & (records.owners == record))[0])
        one, two = extents[medium].tolist()
        if image[medium]:
            size = f"{one} x {two} pixels (height x width)"
            return f"an image of {size}, not multiples of model.image.patch={patch}; resize or pad it"
        return f"a sound of {two} Hz, where model.audio.rate={rate}; resample it"

    chosen = config.task.modalities or [*media(model), TEXT]
    texts = records.lengths[:, 0] - np.bincount(records.owners, minlength=len(records)) > 0
    there = {"image": _holding(records, image & read), "audio": _holding(records, ~image & read), TEXT: texts}
    nothing = ~np.any([there[name] for name in chosen], axis=0)
    has_none = f"it has no {' and no '.join(chosen)}, so there is nothing to read; add some"
    found: list[tuple[np.ndarray, Callable[[int], str]]] = [(of_bad, of_medium), (nothing, lambda record: has_none)]
    if config.task.name == "multimodal_classify":
        none = "it has no label (.cls), or one that no sample of training has; add or correct it"
        found.append((records.classes < 0, lambda record: none))
    if config.task.name == "multimodal_lm":
        found.append((records.lengths[:, 1] == 0, lambda record: "it has no target (.target.txt); add one"))
    return found


def _holding(records: MediaRecords, chosen: np.ndarray) -> np.ndarray:
    """Which records have one of the chosen media, bool [records]."""
    return np.bincount(records.owners[chosen], minlength=len(records)) > 0


def _fitting(records: MediaRecords, chosen: np.ndarray, config: TrainConfig) -> np.ndarray:
    """Numbers of the records that the model's context holds; of others than the chosen ones no one asks. Raises
    UserError or ConfigError."""
    if config.data.too_long == "truncate":
        raise ConfigError("data.too_long", "truncate", "images and sounds can't be cut short; use refuse or skip")
    read = config.task.modalities or [*media(config.model), TEXT]
    tokens, most = records.tokens(config.model, read), config.train.seq_length
    too_long = np.isin(np.arange(len(records)), chosen) & (tokens > most)
    return fitting(records, too_long, config.data, most, lengths=tokens)


def _tokens_of_media(prefix: str, model: ModelConfig) -> dict[str, int]:
    """Tokens that a sample's encoders read on average, rounded up."""
    records = MediaRecords(prefix, "train")
    tokens, kinds = records.tokens_of_media(model), {"image": IMAGE, "audio": AUDIO}
    count = max(1, len(records))
    return {name: -(-int(tokens[records.kinds == kinds[name]].sum()) // count) for name in media(model)}


def _prepare(config: DataConfig, say: Callable[[str], None]) -> Prepared:
    origin = media_origin(config, say)
    prepared = prepare_from(origin, KIND, config, say)
    left_out = read_manifest(prepared.prefix)["left_out"]
    if left_out["count"] and config.on_error == "refuse":  # an earlier run made the index without them
        raise UserError(f"{left_out['first']}, or use data.on_error=skip")
    if left_out["count"]:
        count = f"{left_out['count']:,} of {left_out['samples']:,} samples are left out"
        say(f"data: {origin.name}: {count}, the first: {left_out['first']}")
    return replace(prepared, media=partial(_tokens_of_media, prepared.prefix))


SOURCE = Source("media", "images, sounds and text, from tar shards or loose files", _prepare, Media)
