"""Where samples come from, by name: `data.source`.

Each source is a file with one object, `SOURCE = Source(...)`: `megapar/data/sources/NAME.py`, or for one experiment
`experiments/NAME/data.py`.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from megapar.config.errors import ConfigError, UserError
from megapar.config.experiments import experiment_files
from megapar.config.found import modules_of
from megapar.config.schema import DataConfig, ModelConfig, TrainConfig
from megapar.config.tasks import WINDOWS

Split = Literal["train", "valid"]
PACKAGE = "megapar.data.sources"
FILE = "data.py"  # in the folder of an experiment


@dataclass(frozen=True)
class Prepared:
    """What the launcher knows of data that is ready to train on.

    prefix: of its files, if it has any: PREFIX.json may hold hashes that go into checkpoints
    vocab_size: entries of the tokenizer; None where it is unknown
    max_token: the largest token, below `model.vocab_size`; None where that need not be checked
    tokenizer_path: the tokenizer's file; None where there is none
    classes: that samples belong to; None where they have no labels
    media: of samples with images or sound, tokens per sample that each encoder of a model reads, about, by its stack
    samples: the source of megapar's own whose samples these are like: what a task reads (`config/tasks.py`)
    """

    prefix: str
    vocab_size: int | None = None
    max_token: int | None = None
    tokenizer_path: Path | None = None
    classes: int | None = None
    samples: str = WINDOWS
    media: Callable[[ModelConfig], Mapping[str, int]] | None = field(default=None, compare=False)


class Samples(Protocol):
    """The samples of one split. num_samples: of one epoch."""

    num_samples: int

    def batch(self, indices: Iterable[int]) -> Any:
        """Samples by number, counted from 0 over all epochs, in the form that the task reads: of the task `lm` int64
        [number of indices, seq_length + 1]. With `data.document_mask` the task also asks for `begins(index)`: where in
        a sample's first seq_length tokens its documents begin, int64, 0 first. An attribute `left_out` may hold a line
        on samples that can't be used, which the launcher says."""


@dataclass(frozen=True)
class Source:
    """A source by name.

    prepare: in the launcher, before a rank starts: finds or makes the data; raises UserError. say: shows a line
    open: on every rank: the samples of a split of a resolved config; raises UserError where there are too few
    """

    name: str
    about: str
    prepare: Callable[[DataConfig, Callable[[str], None]], Prepared]
    open: Callable[[TrainConfig, Split], Samples]


def find_source(name: str) -> Source:
    """The source of that name. Raises ConfigError, with those that there are, or UserError for a faulty file."""
    known = modules_of(PACKAGE)
    if name in known:
        return importlib.import_module(f"{PACKAGE}.{name}").SOURCE
    files = experiment_files(FILE)
    if name not in files:
        there = ", ".join(sorted(known | files.keys()))
        raise ConfigError("data.source", name, f"no such source; there are {there}, or write experiments/{name}/{FILE}")
    path, *others = files[name]
    if differ := [other for other in others if other.read_bytes() != path.read_bytes()]:
        raise ConfigError("data.source", name, f"{path} and {differ[0]} differ; rename one of the folders")
    spec = importlib.util.spec_from_file_location(f"experiment_{name}_data", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a file of the user's own may raise
        line = (str(error).splitlines() or [""])[0]
        raise UserError(f"{path}: can't be used as a source ({type(error).__name__}: {line})") from error
    if not isinstance(found := getattr(module, "SOURCE", None), Source):
        raise UserError(f"{path}: declares no source; write SOURCE = Source(...)")
    return found
