"""Samples of images, sound and text: is the class right, or what the model writes, with all of it and with parts?"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from megapar.config.errors import UserError
from megapar.config.keys import changed
from megapar.config.run_schema import SampleConfig
from megapar.config.stacks import TEXT, media
from megapar.data.media.samples import MediaSample
from megapar.data.records import run_labels
from megapar.data.sources.media import SOURCE, Media
from megapar.data.tokenizer import Tokenizer
from megapar.evaluate.kind import Evaluation, Result, Subject
from megapar.evaluate.kinds.choices import named, share, with_error
from megapar.evaluate.scorer import Scorer
from megapar.generate.text import completion
from megapar.generate.tokens import Text


@dataclass(frozen=True)
class Asked:
    """What is asked. texts: that samples have, as text; right: the name of the class of each, or the text that it
    should be; names: of the model's classes, by number; where: SHARD:KEY of each; left_out: how many
    others there are"""

    samples: list[MediaSample]
    texts: list[str]
    right: list[str]
    names: list[str]
    where: list[str]
    left_out: int


def read(path: str, subject: Subject) -> Asked:
    """Shards or loose files, as of `data.source=media`. Raises UserError."""
    config, tokenizer = subject.config, subject.tokenizer
    chosen = subject.options.on_error
    facts: Any = {"on_error": chosen, "too_long": chosen, "split": 0.0, "valid": None}
    data = replace(config.data, source="media", path=path, tokenizer=str(tokenizer.path), **facts)
    try:
        prepared = SOURCE.prepare(data, lambda line: None)
        # It has classes of its own, by names.
        own = {"data.prefix": prepared.prefix, "data.on_error": chosen, "data.too_long": chosen}
        found = Media(changed(config, own | {"model.classes": prepared.classes}), "train")
    except UserError as error:
        raise UserError(_in_our_keys(str(error))) from None
    samples = [found.sample(int(record)) for record in found.chosen]
    where = [found.records.where(int(record)) for record in found.chosen]
    left_out = len(found.records) - len(samples)
    texts = [_spelled(tokenizer, sample.text[sample.text >= 0]) for sample in samples]
    if config.model.output == "classes":
        names = run_labels(subject.folder, config)
        right = [found.labels[sample.label] for sample in samples]
        for label, place in zip(right, where, strict=True):
            if label not in names:
                raise UserError(
                    f'{place}: the label "{label}" is none of the model\'s, which has {", ".join(names[:5])}'
                )
        return Asked(samples, texts, right, names, where, left_out)
    right = [_spelled(tokenizer, sample.target[:-1]) for sample in samples]
    return Asked(samples, texts, right, [], where, left_out)


def _in_our_keys(problem: str) -> str:
    """What is said of a run's data, with the keys of this command."""
    for theirs, ours in (("data.on_error", "on_error"), ("data.too_long", "on_error"), ("data.path=", "media=")):
        problem = problem.replace(theirs, ours)
    return problem


def _spelled(tokenizer: Tokenizer, tokens: np.ndarray) -> str:
    return completion(tokenizer, Text([0, *tokens.tolist()], SampleConfig(), prompt=1))


def measure(data: Asked, subject: Subject, scorer: Scorer) -> Result:
    """The share of right ones, of the modalities that the run has learned to read: together, and by each set of them.
    Samples that have none of a set are left out there."""
    learned = subject.config.task.modalities or [*media(subject.config.model), TEXT]
    there = [name for name in learned if any(sample.has(name) for sample in data.samples)]
    sets = [chosen for size in range(len(there), 0, -1) for chosen in combinations(there, size)]
    unit = "accuracy" if data.names else "exact match"
    figures: dict[str, Any] = {}
    rows = [("modalities", "samples", unit)]
    for chosen in sets:
        numbers = [number for number, sample in enumerate(data.samples) if any(map(sample.has, chosen))]
        answers = _answers(data, numbers, chosen, subject, scorer)
        found = share([answer == data.right[number] for number, answer in zip(numbers, answers, strict=True)])
        name = "+".join(chosen)
        items = [
            {"sample": data.where[number], "text": data.texts[number], "right": data.right[number], "answer": answer}
            for number, answer in zip(numbers, answers, strict=True)
        ]
        figures[name] = {"samples": len(numbers)} | named(unit.replace(" ", "_"), found) | {"items": items}
        rows.append((name, f"{len(numbers):,}", with_error(found)))
    shown = [("samples", f"{len(data.samples):,}")]
    if data.left_out:
        shown.append(("left out", f"{data.left_out:,}"))
    return Result({"left_out": data.left_out} | figures, shown, rows)


def _answers(
    data: Asked, numbers: Sequence[int], chosen: Sequence[str], subject: Subject, scorer: Scorer
) -> list[str | None]:
    """The class of each sample, or what is written of it; None where that has no end."""
    samples = [data.samples[number].only(chosen) for number in numbers]
    if data.names:
        return [data.names[best] for best in scorer.scores_of_media(samples).argmax(1).tolist()]
    most = [min(len(data.right[number].encode()), subject.context_length) + 1 for number in numbers]
    written = scorer.greedy(samples, most, subject.tokenizer)
    return [text if ended else None for text, ended in written]


EVALUATION = Evaluation("media", ("lm", "classes"), read, measure, reads="media")
