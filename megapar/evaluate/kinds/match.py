"""Exact match: does the model write a response, and end there, when it takes the likeliest token each time?"""

from dataclasses import dataclass
from pathlib import Path

from megapar.data.jsonl import Line, read_lines
from megapar.evaluate.kind import Evaluation, Result, Subject
from megapar.evaluate.kinds.choices import named, refuse_long, share, with_error
from megapar.evaluate.scorer import Scorer
from megapar.generate.text import prompt_tokens


@dataclass(frozen=True)
class Wanted:
    """A line. most: tokens that could spell the response, and one that ends it"""

    number: int
    prompt: list[int]
    response: str
    most: int


def read(path: str, subject: Subject) -> list[Wanted]:
    """Lines `{"prompt": text, "response": text}`, tokenised apart, as for fine-tuning."""
    return [_wanted(line, subject) for line in read_lines(Path(path), "match")]


def _wanted(line: Line, subject: Subject) -> Wanted:
    prompt = prompt_tokens(subject.tokenizer, line.text("prompt", empty=True))
    response = line.text("response")
    refuse_long(line, len(prompt) + len(subject.tokenizer.encode(response)), subject)
    spelled = min(len(response.encode()), subject.context_length - len(prompt))
    return Wanted(line.number, prompt, response, spelled + 1)


def measure(data: list[Wanted], subject: Subject, scorer: Scorer) -> Result:
    """The share of prompts behind which the model writes the response and nothing more."""
    written = scorer.greedy([one.prompt for one in data], [one.most for one in data], subject.tokenizer)
    items = [
        {"line": one.number, "written": text, "ended": ended, "matches": ended and text == one.response}
        for one, (text, ended) in zip(data, written, strict=True)
    ]
    found = share([bool(item["matches"]) for item in items])
    figures = {"prompts": len(items)} | named("exact_match", found) | {"items": items}
    return Result(figures, [("prompts", f"{len(items):,}"), ("exact match", with_error(found))])


EVALUATION = Evaluation("match", "lm", read, measure)
