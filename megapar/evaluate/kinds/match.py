"""Exact match: does the model write a response, and end there, when it takes the likeliest token each time?"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from megapar.config.run_schema import SampleConfig
from megapar.data.jsonl import Line, read_lines
from megapar.data.sources import instructions
from megapar.data.tokenizer.contract import Piece, RefusedConversation
from megapar.evaluate.kind import Evaluation, Result, Subject
from megapar.evaluate.kinds.choices import named, refuse_long, share, with_error
from megapar.evaluate.scorer import Scorer
from megapar.generate.prompts import most_tokens
from megapar.generate.text import completion, prompt_tokens
from megapar.generate.tokens import Text


@dataclass(frozen=True)
class Wanted:
    """A line. most: tokens that could spell the response, and one that ends it; ends: see `Text`"""

    number: int
    prompt: list[int]
    response: str
    most: int
    ends: Collection[int] = ()


def read(path: str, subject: Subject) -> list[Wanted]:
    """Lines `{"prompt": text, "response": text}`, tokenised apart, or `{"messages": [...]}`, of which the last answer
    is the response; all as for fine-tuning. Of a model with an encoder lines `{"source": text, "target": text}`."""
    lines = list(read_lines(Path(path), "match"))
    if subject.reads:
        return [_target(line, subject) for line in lines]
    talks = [line for line in lines if "messages" in line.values]
    try:
        written = subject.tokenizer.conversations([instructions.parse(line).messages for line in talks])
    except RefusedConversation as error:
        raise talks[error.number].wrong(error.problem) from None
    pieces = iter(written)
    return [
        _last_answer(line, next(pieces), subject) if "messages" in line.values else _response(line, subject)
        for line in lines
    ]


def _response(line: Line, subject: Subject) -> Wanted:
    prompt = prompt_tokens(subject.tokenizer, line.text("prompt", empty=True))
    response = line.text("response")
    refuse_long(line, len(prompt) + len(subject.tokenizer.encode(response)), subject)
    return _wanted(line, prompt, response, subject)


def _target(line: Line, subject: Subject) -> Wanted:
    source, target = prompt_tokens(subject.tokenizer, line.text("source")), line.text("target")
    if len(source) > (most := most_tokens(subject.config)):
        hold = f"the encoder reads train.source_length={subject.config.train.source_length} with the end of text"
        raise line.wrong(f"a source of {len(source)} tokens, and {hold}, which is {most} at most; shorten it")
    refuse_long(line, len(subject.tokenizer.encode(target)), subject)
    return Wanted(line.number, source, target, min(len(target.encode()), subject.context_length) + 1)


def _last_answer(line: Line, pieces: list[Piece], subject: Subject) -> Wanted:
    last = max(number for number, (_, answer) in enumerate(pieces) if answer)
    prompt = [token for ids, _ in pieces[:last] for token in ids]
    tokens = prompt + pieces[last][0]
    refuse_long(line, len(tokens) - 1, subject)  # what ends it is only predicted
    response = completion(subject.tokenizer, Text(tokens, SampleConfig(), prompt=len(prompt)))
    return _wanted(line, prompt, response, subject, subject.tokenizer.answer_ends)


def _wanted(line: Line, prompt: list[int], response: str, subject: Subject, ends: Collection[int] = ()) -> Wanted:
    spelled = min(len(response.encode()), subject.context_length - len(prompt))
    return Wanted(line.number, prompt, response, spelled + 1, ends)


def measure(data: list[Wanted], subject: Subject, scorer: Scorer) -> Result:
    """The share of prompts after which the model writes the response and nothing more."""
    prompts, most, ends = ([getattr(one, name) for one in data] for name in ("prompt", "most", "ends"))
    written = scorer.greedy(prompts, most, subject.tokenizer, ends)
    items = [
        {"line": one.number, "written": text, "ended": ended, "matches": ended and text == one.response}
        for one, (text, ended) in zip(data, written, strict=True)
    ]
    found = share([bool(item["matches"]) for item in items])
    figures = {"prompts": len(items)} | named("exact_match", found) | {"items": items}
    return Result(figures, [("prompts", f"{len(items):,}"), ("exact match", with_error(found))])


EVALUATION = Evaluation("match", ("lm",), read, measure, reads="source")
