"""Prompts with responses, from a JSONL file: several in a row of tokens, of which the responses are learned."""

from collections.abc import Callable, Iterable

import numpy as np

from megapar.config.schema import DataConfig, TrainConfig
from megapar.data.jsonl import Line
from megapar.data.order import SampleOrder
from megapar.data.packing import pack
from megapar.data.records import Kind, Part, Record, Records, fitting, prepare_records, refuse_too_few, teaching
from megapar.data.source import Prepared, Source, Split

ROLES = ("user", "assistant")


def parse(line: Line) -> Record:
    """`{"prompt": text, "response": text}`: the response is learned, and the end of text after it. Or a conversation,
    `{"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}, ...]}`, maybe with a
    system message first: answers are learned, and what ends them."""
    if "messages" in line.values:
        if both := [key for key in ("prompt", "response") if key in line.values]:
            raise line.wrong(f'has "messages" and "{both[0]}"; keep the messages, or prompt and response')
        return _conversation(line)
    prompt, response = line.text("prompt"), line.text("response")
    parts = (Part(prompt), Part(response, learned=True, closes=True))
    return Record(line, (parts,), prompt)


def _conversation(line: Line) -> Record:
    given = line.values["messages"]
    if not isinstance(given, list) or not all(isinstance(one, dict) for one in given):
        raise line.wrong('"messages" is not a list of objects; write [{"role": ..., "content": ...}, ...]')
    said = [Line(line.path, line.number, one) for one in given]
    messages = tuple((one.text("role"), one.text("content")) for one in said)
    roles = [role for role, _ in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or len(turns) % 2 or turns != [*ROLES] * (len(turns) // 2):
        there = f"has the roles {', '.join(roles)}" if roles else "is empty"
        rule = "user and assistant take turns, the assistant last; a system message may come first"
        raise line.wrong(f'"messages" {there}: {rule}')
    parts = tuple(Part(text) for _, text in messages)
    return Record(line, (parts,), messages[-2][1], messages=messages)


KIND = Kind("instructions", parse)


class Instructions:
    """Rows of at most `seq_length` tokens of instructions; a row is a sample. "train" shuffles them every epoch anew.

    An instruction of n tokens takes n - 1 places: its last token is only predicted. counts: learned tokens of every row
    """

    def __init__(self, config: TrainConfig, split: Split) -> None:
        assert config.data.prefix is not None
        self.records, self.length = Records(config.data.prefix, split), config.train.seq_length
        refuse_too_few(self.records, split, config.data)
        lengths = np.minimum(self.records.lengths[:, 0] - 1, self.length)
        learned = np.array([self._learned(record) for record in range(len(self.records))])
        most = self.length + 1
        chosen = fitting(self.records, self.records.lengths[:, 0] > most, config.data, most)
        chosen = teaching(self.records, chosen, learned[chosen])
        rows = pack(lengths[chosen], self.length) if config.data.packing else [[n] for n in range(len(chosen))]
        self._rows = [chosen[row] for row in rows]
        self.counts = np.array([learned[row].sum() for row in self._rows])
        self.num_samples = len(self._rows)
        self.order = SampleOrder(self.num_samples, config.train.seed, shuffle=split == "train")

    def _learned(self, record: int) -> int:
        """Learned tokens of an instruction that is no longer than a row, at its end."""
        return int(self.records.sequence(record, most=self.length + 1)[1][1:].sum())

    def batch(self, indices: Iterable[int]) -> list[list[tuple[np.ndarray, np.ndarray]]]:
        """Of every sample its instructions, in order: (tokens int64 [n], learned bool [n]), cut to fit."""
        rows = [self._rows[self.order.item(int(index))] for index in indices]
        return [[self.records.sequence(int(record), most=self.length + 1) for record in row] for row in rows]

    def count(self, indices: Iterable[int]) -> int:
        """Learned tokens of samples."""
        return int(sum(self.counts[self.order.item(int(index))] for index in indices))


def _prepare(config: DataConfig, say: Callable[[str], None]) -> Prepared:
    return prepare_records(KIND, config, say)


SOURCE = Source("instructions", "prompts with responses, from JSONL", _prepare, Instructions)
