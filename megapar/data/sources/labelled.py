"""Texts with labels, from a JSONL file, one in a row of tokens."""

from collections.abc import Callable, Iterable

import numpy as np

from megapar.config.errors import ConfigError
from megapar.config.schema import DataConfig, TrainConfig
from megapar.data.jsonl import Line
from megapar.data.order import SampleOrder
from megapar.data.records import Kind, Part, Record, Records, fitting, prepare_records, refuse_too_few
from megapar.data.source import Prepared, Source, Split


def parse(line: Line) -> Record:
    """`{"text": text, "label": text}`, and maybe `"group": text`: records of one group are held out together."""
    text, label = line.text("text"), line.text("label")
    group = line.text("group") if "group" in line.values else text
    return Record(line, ((Part(text),),), group, label)


KIND = Kind("labelled", parse, between=True)


class Labelled:
    """Texts of at most `seq_length` tokens, each a sample with its class. "train" shuffles every epoch anew."""

    def __init__(self, config: TrainConfig, split: Split) -> None:
        assert config.data.prefix is not None
        self.records, self.length = Records(config.data.prefix, split), config.train.seq_length
        refuse_too_few(self.records, split, config.data)
        classes, labels = config.model.classes, len(self.records.labels)
        if classes is not None and classes != labels:
            problem = f"the data has {labels} labels; leave model.classes out, or set it to that"
            raise ConfigError("model.classes", classes, problem)
        lengths = self.records.lengths[:, 0]
        self._chosen = fitting(self.records, lengths > self.length, config.data, self.length)
        self.num_samples = len(self._chosen)
        self.order = SampleOrder(self.num_samples, config.train.seed, shuffle=split == "train")

    def batch(self, indices: Iterable[int]) -> dict[str, np.ndarray]:
        """ids int64 [n, seq_length], 0 after their ends; lengths int64 [n]; classes int64 [n]."""
        records = [int(self._chosen[self.order.item(int(index))]) for index in indices]
        ids = np.zeros((len(records), self.length), dtype=np.int64)
        lengths = np.minimum(self.records.lengths[records, 0], self.length)
        for row, record, length in zip(ids, records, lengths, strict=True):
            tokens = self.records.sequence(record)[0]
            row[:length] = tokens[:length]
            row[length - 1] = tokens[-1]  # also of a text that is cut
        return {"ids": ids, "lengths": lengths, "classes": self.records.classes[records]}


def _prepare(config: DataConfig, say: Callable[[str], None]) -> Prepared:
    return prepare_records(KIND, config, say)


SOURCE = Source("labelled", "texts with labels, from JSONL", _prepare, Labelled)
