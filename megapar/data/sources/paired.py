"""Sources with targets, from a JSONL file: what an encoder reads, and what its decoder is to write."""

from collections.abc import Callable, Iterable

import numpy as np

from megapar.config.schema import DataConfig, TrainConfig
from megapar.data.jsonl import Line
from megapar.data.order import SampleOrder
from megapar.data.records import Kind, Part, Record, Records, fitting, prepare_records, refuse_too_few
from megapar.data.source import Prepared, Source, Split


def parse(line: Line) -> Record:
    """`{"source": text, "target": text}`, and maybe `"group": text`: records of one group are held out together."""
    source, target = line.text("source"), line.text("target")
    group = line.text("group") if "group" in line.values else source
    return Record(line, ((Part(source, closes=True),), (Part(target, learned=True, closes=True),)), group)


KIND = Kind("paired", parse, sequences=2)
SIDES, KEYS = ("source", "target"), ("train.source_length", "train.seq_length")


class Paired:
    """Pairs of at most `source_length` and `seq_length` tokens, each a sample. "train" shuffles every epoch anew.

    counts: tokens of every target
    """

    def __init__(self, config: TrainConfig, split: Split) -> None:
        assert config.data.prefix is not None and config.train.source_length is not None
        self.records = Records(config.data.prefix, split)
        self.most = np.array([config.train.source_length, config.train.seq_length])
        refuse_too_few(self.records, split, config.data)
        too_long = self.records.lengths > self.most
        side = int(too_long[too_long.any(1)][:1, 0].sum() == 0)  # of the first one that doesn't fit
        most = f"{self.most[side]} of a {SIDES[side]}"
        lengths = self.records.lengths[:, side]
        self._chosen = fitting(self.records, too_long.any(1), config.data, most, KEYS[side], lengths)
        self.lengths = np.minimum(self.records.lengths[self._chosen], self.most)
        self.num_samples = len(self._chosen)
        self.order = SampleOrder(self.num_samples, config.train.seed, shuffle=split == "train")

    def batch(self, indices: Iterable[int]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of every sample (source, target), int64 [n] each, cut to fit: their last token is the end of text."""
        return [self._pair(self.order.item(int(index))) for index in indices]

    def _pair(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        record = int(self._chosen[number])
        source, target = (self.records.sequence(record, place)[0] for place in range(2))
        return _cut(source, self.most[0]), _cut(target, self.most[1])

    def count(self, indices: Iterable[int]) -> int:
        """Tokens of the targets of samples."""
        return int(sum(self.lengths[self.order.item(int(index)), 1] for index in indices))


def _cut(tokens: np.ndarray, most: int) -> np.ndarray:
    return tokens if len(tokens) <= most else np.append(tokens[: most - 1], tokens[-1])


def _prepare(config: DataConfig, say: Callable[[str], None]) -> Prepared:
    return prepare_records(KIND, config, say)


SOURCE = Source("paired", "sources with targets, from JSONL", _prepare, Paired)
