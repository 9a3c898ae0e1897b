"""Pairs of responses to a prompt, of which one is preferred, from a JSONL file."""

from collections.abc import Callable, Iterable

import numpy as np

from megapar.config.schema import DataConfig, TrainConfig
from megapar.data.jsonl import Line
from megapar.data.order import SampleOrder
from megapar.data.records import Kind, Part, Record, Records, fitting, prepare_records, refuse_too_few
from megapar.data.source import Prepared, Source, Split

Sequence = tuple[np.ndarray, np.ndarray]


def parse(line: Line) -> Record:
    """`{"prompt": text, "chosen": text, "rejected": text}`."""
    prompt, chosen, rejected = (line.text(key) for key in ("prompt", "chosen", "rejected"))
    if chosen == rejected:
        raise line.wrong('"chosen" and "rejected" are the same; there is nothing to prefer')
    answers = (Part(text, learned=True, closes=True) for text in (chosen, rejected))
    first, second = ((Part(prompt), answer) for answer in answers)
    return Record(line, (first, second), prompt)


KIND = Kind("preferences", parse, sequences=2)


class Preferences:
    """A sample is a pair, both in one row of `seq_length` tokens, each with its prompt. "train" shuffles every
    epoch anew."""

    def __init__(self, config: TrainConfig, split: Split) -> None:
        assert config.data.prefix is not None
        self.records, self.length = Records(config.data.prefix, split), config.train.seq_length
        refuse_too_few(self.records, split, config.data)
        most = self.length + 2  # the last token of each is only predicted
        self._chosen = fitting(self.records, self.records.lengths.sum(1) > most, config.data, most)
        self.num_samples = len(self._chosen)
        self.order = SampleOrder(self.num_samples, config.train.seed, shuffle=split == "train")

    def batch(self, indices: Iterable[int]) -> list[tuple[Sequence, Sequence]]:
        """Of every sample the chosen and the rejected response behind their prompt: (tokens [n], learned [n]) each."""
        return [self._pair(int(self._chosen[self.order.item(int(index))])) for index in indices]

    def _pair(self, record: int) -> tuple[Sequence, Sequence]:
        pair = self.records.sequence(record, 0), self.records.sequence(record, 1)
        if sum(len(tokens) for tokens, _ in pair) <= self.length + 2:
            return pair
        half = self.length // 2 + 1
        return self.records.sequence(record, 0, half), self.records.sequence(record, 1, half)


def _prepare(config: DataConfig, say: Callable[[str], None]) -> Prepared:
    return prepare_records(KIND, config, say)


SOURCE = Source("preferences", "pairs of a chosen and a rejected response, from JSONL", _prepare, Preferences)
