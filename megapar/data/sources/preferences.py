"""Pairs of responses to a prompt, of which one is preferred, from a JSONL file."""

from collections.abc import Callable, Iterable

import numpy as np

from megapar.config.schema import DataConfig, TrainConfig
from megapar.data.jsonl import Line
from megapar.data.order import SampleOrder
from megapar.data.records import Kind, Part, Record, Records, fitting, prepare_records, refuse_too_few, teaching
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
    """A sample is a pair, both in one row of `seq_length` tokens, each after its prompt. "train" shuffles every
    epoch anew. A pair of which either response is cut off is left out."""

    def __init__(self, config: TrainConfig, split: Split) -> None:
        assert config.data.prefix is not None
        self.records, self.length = Records(config.data.prefix, split), config.train.seq_length
        refuse_too_few(self.records, split, config.data)
        self._most = self.length + 2  # the last token of each is only predicted
        chosen = fitting(self.records, self.records.lengths.sum(1) > self._most, config.data, self._most)
        learned = [min(own[1:].sum() for _, own in self._pair(int(record))) for record in chosen]
        self._chosen = teaching(self.records, chosen, np.array(learned))
        self.num_samples = len(self._chosen)
        self.order = SampleOrder(self.num_samples, config.train.seed, shuffle=split == "train")

    def batch(self, indices: Iterable[int]) -> list[tuple[Sequence, Sequence]]:
        """Of every sample the chosen and the rejected response after their prompt: (tokens [n], learned [n]) each."""
        return [self._pair(int(self._chosen[self.order.item(int(index))])) for index in indices]

    def _pair(self, record: int) -> tuple[Sequence, Sequence]:
        """Both sequences. What is too long for a row is cut off the longer one, down to half a row; then off both."""
        half = self._most // 2
        first, second = (int(length) for length in self.records.lengths[record])
        room = max(half, self._most - second), max(half, self._most - first)
        return self.records.sequence(record, 0, room[0]), self.records.sequence(record, 1, room[1])


def _prepare(config: DataConfig, say: Callable[[str], None]) -> Prepared:
    return prepare_records(KIND, config, say)


SOURCE = Source("preferences", "pairs of a chosen and a rejected response, from JSONL", _prepare, Preferences)
