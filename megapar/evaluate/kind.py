"""What a way to evaluate is, and which there are."""

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from megapar.config.errors import ConfigError
from megapar.config.schema import TrainConfig
from megapar.data.tokenizer import Tokenizer
from megapar.evaluate import kinds as package
from megapar.evaluate.config import EvalConfig
from megapar.evaluate.scorer import Scorer


@dataclass(frozen=True)
class Subject:
    """What is evaluated, as the launcher and every rank know it. config: of the run, in whatever layout"""

    folder: Path
    config: TrainConfig
    tokenizer: Tokenizer
    options: EvalConfig

    @property
    def context_length(self) -> int:
        return self.config.train.seq_length

    @property
    def reads(self) -> bool:
        """Whether an encoder reads what is asked."""
        return self.config.model.encoder.layers > 0


@dataclass(frozen=True)
class Result:
    """figures: for JSON, those of single items too; shown, table: rows of cells for the terminal."""

    figures: dict[str, Any]
    shown: Sequence[tuple[str, str]]
    table: Sequence[tuple[str, ...]] = ()


@dataclass(frozen=True)
class Evaluation:
    """A way to evaluate.

    name: of the key that names the data
    outputs: values of `model.output` that it is for
    reads: what its models read: `text` alone, `source` (also models with an encoder beside a decoder), or `media`
    read: (path, subject) -> the data. The launcher calls it too, so that what can't be used is refused before ranks
        start. Raises UserError, with file and line number.
    measure: (data, subject, scorer) -> the figures. Collective.
    """

    name: str
    outputs: tuple[str, ...]
    read: Callable[[str, Subject], Any]
    measure: Callable[[Any, Subject, Scorer], Result]
    reads: Literal["text", "source", "media"] = "text"


@cache
def evaluations() -> dict[str, Evaluation]:
    """Every way to evaluate, by name."""
    names = sorted(found.name for found in pkgutil.iter_modules(package.__path__))
    modules = [importlib.import_module(f"{package.__name__}.{name}") for name in names]
    return {module.EVALUATION.name: module.EVALUATION for module in modules}


def asked(config: EvalConfig) -> dict[str, str]:
    """The data of every evaluation that is asked for, by its name. Raises ConfigError where there is none."""
    found = {name: getattr(config, name) for name in evaluations()}
    if not any(found.values()):
        raise ConfigError(
            "text", None, "there is nothing to evaluate; give text=FILE, choices=, match=, labels= or media="
        )
    return {name: path for name, path in found.items() if path is not None}


def refuse(subject: Subject, names: Sequence[str]) -> None:
    """Raise ConfigError for what this model can't be asked, and for a stride that leaves tokens out."""
    model = subject.config.model
    for name in names:
        needs = evaluations()[name].outputs
        path = getattr(subject.options, name)
        if model.output not in needs:
            remedy = "use labels=FILE" if model.output == "classes" else f"use a run with model.output={needs[0]}"
            raise ConfigError(name, path, f"this run has model.output={model.output}; {remedy}")
        reads = evaluations()[name].reads
        if model.encoder.layers and reads != "source":
            able = ", ".join(f"{name}=FILE" for name, one in evaluations().items() if one.reads == "source")
            raise ConfigError(name, path, f"this run's model has an encoder; it can be asked {able}")
        if reads == "media" and not model.has_media:
            raise ConfigError(name, path, "this run's model reads text alone; use one of images or sound")
        if model.output == "lm" and not model.causal:
            problem = "this run's model sees what it would predict (model.causal=false); use a run of a causal one"
            raise ConfigError(name, path, problem)
    stride, length = subject.options.stride, subject.context_length
    if stride is not None and stride > length:
        problem = f"would leave tokens out between windows of train.seq_length={length}; use at most that"
        raise ConfigError("stride", stride, problem)
