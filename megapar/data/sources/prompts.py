"""Prompts that a policy answers, from a JSONL file, with whatever else its reward looks at."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megapar.config.schema import DataConfig, TrainConfig
from megapar.data.jsonl import Line
from megapar.data.order import SampleOrder
from megapar.data.records import Kind, Part, Record, Records, fitting, prepare_records, refuse_too_few
from megapar.data.source import Prepared, Source, Split


def parse(line: Line) -> Record:
    """`{"prompt": text, ...}` with any other keys, and maybe `"group": text`: records of one group are held out
    together."""
    prompt = line.text("prompt")
    group = line.text("group") if "group" in line.values else prompt
    return Record(line, ((Part(prompt),),), group)


KIND = Kind("prompts", parse, keeps=True)


@dataclass(frozen=True)
class Prompt:
    """tokens: at least one; values: the object of its line; where: FILE:LINE"""

    tokens: list[int]
    values: Mapping[str, Any]
    where: str


class Prompts:
    """Prompts, each a sample, behind which `task.max_tokens` fit into `seq_length`. "train" shuffles every epoch
    anew."""

    def __init__(self, config: TrainConfig, split: Split) -> None:
        assert config.data.prefix is not None
        self.records = Records(config.data.prefix, split)
        refuse_too_few(self.records, split, config.data)
        most = config.train.seq_length - config.task.max_tokens + 1  # the last token is only predicted
        lengths, fit = self.records.lengths[:, 0], f"{max(0, most)} before task.max_tokens={config.task.max_tokens}"
        keys = "train.seq_length, or lower task.max_tokens"
        self._chosen = fitting(self.records, lengths > most, config.data, fit, keys)
        self.num_samples = len(self._chosen)
        self.order = SampleOrder(self.num_samples, config.train.seed, shuffle=split == "train")

    def batch(self, indices: Iterable[int]) -> list[Prompt]:
        return [self._prompt(int(self._chosen[self.order.item(int(index))])) for index in indices]

    def _prompt(self, record: int) -> Prompt:
        tokens = self.records.sequence(record)[0].tolist()
        return Prompt(tokens, self.records.values(record), self.records.where(record))


def _prepare(config: DataConfig, say: Callable[[str], None]) -> Prepared:
    return prepare_records(KIND, config, say)


SOURCE = Source("prompts", "prompts for a policy, from JSONL", _prepare, Prompts)
