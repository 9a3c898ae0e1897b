"""A classifier's accuracy, and what it takes for what."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megapar.data.jsonl import Line, read_lines
from megapar.data.records import run_labels
from megapar.evaluate.kind import Evaluation, Result, Subject
from megapar.evaluate.kinds.choices import named, refuse_long, share, with_error
from megapar.evaluate.scorer import Scorer


@dataclass(frozen=True)
class Labelled:
    """Tokens of texts with their classes. names: of the classes by number"""

    names: list[str]
    lines: list[int]
    texts: list[list[int]]
    classes: list[int]


def read(path: str, subject: Subject) -> Labelled:
    """Lines `{"text": text, "label": name of a class}`, tokenised as for training."""
    names = run_labels(subject.folder, subject.config)
    numbers = {name: number for number, name in enumerate(names)}
    lines = list(read_lines(Path(path), "labels"))
    return Labelled(
        names,
        [line.number for line in lines],
        [_tokens(line, subject) for line in lines],
        [_class(line, numbers) for line in lines],
    )


def _tokens(line: Line, subject: Subject) -> list[int]:
    before, behind = subject.tokenizer.classified
    tokens = [*before, *subject.tokenizer.encode(line.text("text")), *behind]
    if subject.config.data.too_long == "truncate" and len(tokens) > subject.context_length:
        return [*tokens[: subject.context_length - 1], tokens[-1]]
    refuse_long(line, len(tokens), subject, "text")
    return tokens


def _class(line: Line, numbers: dict[str, int]) -> int:
    label = line.text("label")
    if label not in numbers:
        some = ", ".join(list(numbers)[:5]) + ("..." if len(numbers) > 5 else "")
        raise line.wrong(
            f'the label "{label}" is none of the model\'s, which has {some}; correct it, or remove the line'
        )
    return numbers[label]


def measure(data: Labelled, subject: Subject, scorer: Scorer) -> Result:
    """Accuracy, and of every class how much of what is called so is (precision), and how much is found (recall)."""
    scores = scorer.scores(data.texts)
    chosen = scores.argmax(1).tolist()
    classes = range(scores.shape[1])
    names = [data.names[number] if number < len(data.names) else str(number) for number in classes]
    found = share([one == right for one, right in zip(chosen, data.classes, strict=True)])
    pairs = list(zip(chosen, data.classes, strict=True))
    by_class: dict[str, Any] = {}
    for number in classes:
        hits, called, there = pairs.count((number, number)), chosen.count(number), data.classes.count(number)
        precision, recall = (hits / count if count else None for count in (called, there))
        by_class[names[number]] = {"precision": precision, "recall": recall, "texts": there}
    rows = [(name, _text(one["precision"]), _text(one["recall"]), str(one["texts"])) for name, one in by_class.items()]
    items = [
        {"line": line, "label": names[right], "chosen": names[one], "scores": row}
        for line, right, one, row in zip(data.lines, data.classes, chosen, scores.tolist(), strict=True)
    ]
    figures = {"texts": len(items)} | named("accuracy", found) | {"classes": by_class, "items": items}
    shown = [("texts", f"{len(items):,}"), ("accuracy", with_error(found))]
    return Result(figures, shown, [("class", "precision", "recall", "texts"), *rows])


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


EVALUATION = Evaluation("labels", ("classes",), read, measure)
