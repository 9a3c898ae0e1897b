"""Questions with several answers: is the right one the likeliest behind the prompt?"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megapar.data.jsonl import Line, read_lines
from megapar.data.tokenizer import Tokenizer
from megapar.evaluate.kind import Evaluation, Result, Subject
from megapar.evaluate.scorer import Scorer, Span


@dataclass(frozen=True)
class Question:
    """A line. spans: prompt and choice, of every choice; sizes: bytes of the choices; answer: the right one's number"""

    number: int
    spans: list[Span]
    sizes: list[int]
    answer: int


def read(path: str, subject: Subject) -> list[Question]:
    """Lines `{"prompt": text, "choices": [text, ...], "answer": number from 0 on, or text of a choice}`."""
    return [_question(line, subject) for line in read_lines(Path(path), "choices")]


def _question(line: Line, subject: Subject) -> Question:
    prompt, choices = line.text("prompt", empty=True), _choices(line)
    spans = [continued(subject.tokenizer, prompt, choice) for choice in choices]
    for span in spans:
        if not span.predicted:
            raise line.wrong("a choice adds no token to the prompt; begin it with a space, or end the prompt earlier")
        refuse_long(line, len(span.tokens) - 1, subject)
    return Question(line.number, spans, [len(choice.encode()) for choice in choices], _answer(line, choices))


def _choices(line: Line) -> list[str]:
    choices = line.values.get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice for choice in choices):
        raise line.wrong('"choices" must be a list of strings, none of them empty; fix the line, or remove it')
    if len(choices) < 2:
        raise line.wrong(f'"choices" has {len(choices)}; give at least two')
    for choice in choices:
        Line(line.path, line.number, {"choices": choice}).text("choices")  # valid Unicode
    return choices


def _answer(line: Line, choices: list[str]) -> int:
    answer = line.values.get("answer")
    if isinstance(answer, str):
        if answer in choices:
            return choices.index(answer)
        raise line.wrong('"answer" is none of the choices; write the text of one, or its number from 0 on')
    if not isinstance(answer, int) or isinstance(answer, bool):
        raise line.wrong('"answer" must be the number of a choice, from 0 on, or its text')
    if not 0 <= answer < len(choices):
        raise line.wrong(f'"answer" is {answer}, and choices are counted from 0 to {len(choices) - 1}')
    return answer


def refuse_long(line: Line, tokens: int, subject: Subject, what: str = "prompt") -> None:
    """Raise UserError for more tokens than the model can look at. what: is to be shortened"""
    if tokens > (most := subject.context_length):
        raise line.wrong(
            f"{tokens} tokens, of which train.seq_length={most} fit; shorten the {what}, or remove the line"
        )


def continued(tokenizer: Tokenizer, prompt: str, text: str) -> Span:
    """A prompt and the text behind it, which is predicted.

    They are tokenised as one, and what is behind as many tokens as the prompt alone has counts as the text's; spaces at
    the prompt's end belong to the text, as most tokenizers join them with the word behind (lm-evaluation-harness,
    `TemplateLM._encode_pair`). Behind no prompt a text begins as documents do, with the end of the one before.
    """
    kept = prompt.rstrip()
    text = prompt[len(kept) :] + text
    if not kept:
        return Span([tokenizer.end_of_text, *tokenizer.encode(text)], 1)
    return Span(tokenizer.encode(kept + text), len(tokenizer.encode(kept)))


def measure(data: list[Question], subject: Subject, scorer: Scorer) -> Result:
    """Accuracy by log-likelihood, and by log-likelihood per byte of a choice, with their standard errors."""
    found = iter(scorer.log_likelihoods([span for question in data for span in question.spans])[:, 0].tolist())
    items: list[dict[str, Any]] = []
    for question in data:
        likely = [next(found) for _ in question.spans]
        by_byte = [one / size for one, size in zip(likely, question.sizes, strict=True)]
        items.append(
            {
                "line": question.number,
                "log_likelihoods": likely,
                "bytes": question.sizes,
                "answer": question.answer,
                "chosen": likely.index(max(likely)),
                "chosen_by_byte": by_byte.index(max(by_byte)),
            }
        )
    accuracy, by_bytes = (
        share([item[key] == item["answer"] for item in items]) for key in ("chosen", "chosen_by_byte")
    )
    figures = {"questions": len(items)} | named("accuracy", accuracy) | named("accuracy_by_byte", by_bytes)
    shown = [
        ("questions", f"{len(items):,}"),
        ("accuracy", with_error(accuracy)),
        ("accuracy by byte", with_error(by_bytes)),
    ]
    return Result(figures | {"items": items}, shown)


def share(right: list[bool]) -> tuple[float, float | None]:
    """(the mean, its standard error by the sample's deviation); None for a single item."""
    count = len(right)
    mean = sum(right) / count
    return mean, math.sqrt(mean * (1 - mean) / (count - 1)) if count > 1 else None


def named(name: str, found: tuple[float, float | None]) -> dict[str, float | None]:
    """The two in JSON."""
    return {name: found[0], f"{name}_stderr": found[1]}


def with_error(found: tuple[float, float | None]) -> str:
    """`0.7500 ± 0.0685`."""
    mean, error = found
    return f"{mean:.4f}" + ("" if error is None else f" ± {error:.4f}")


EVALUATION = Evaluation("choices", ("lm",), read, measure)
