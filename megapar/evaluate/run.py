"""`megapar eval`: one rank of a model that is evaluated."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from megapar.config.errors import ConfigError
from megapar.config.file import load_trained
from megapar.config.schema import TrainConfig
from megapar.console import console
from megapar.evaluate.config import EvalConfig
from megapar.evaluate.kind import Result, Subject, asked, evaluations, refuse
from megapar.evaluate.scorer import Scorer
from megapar.generate.run import in_layout, refuse_other_tokenizer
from megapar.generate.text import run_tokenizer
from megapar.parallel.agreement import all_or_none
from megapar.part import open_part


def subject_of(config: EvalConfig, trained: TrainConfig) -> Subject:
    """What a resolved config evaluates. Raises UserError."""
    folder = Path(str(config.run.dir))
    subject = Subject(folder, trained, run_tokenizer(folder, trained), config)
    refuse(subject, list(asked(config)))
    return subject


def read(subject: Subject) -> dict[str, Any]:
    """The data of every evaluation that is asked for. Raises UserError, with file and line number."""
    return {name: evaluations()[name].read(path, subject) for name, path in asked(subject.options).items()}


def run_rank(config: EvalConfig, rank: int, world_size: int) -> None:
    """Evaluate as rank `rank` of `world_size`, the default process group being up.

    Rank 0 shows the figures on the terminal, and writes them to `config.out`. Raises UserError.
    """
    trained = in_layout(load_trained(config), config)
    part, manifest = open_part(trained, config.checkpoint.load or str(config.run.dir), rank)
    with all_or_none(part.mesh["world"], part.mesh.device):
        subject = subject_of(config, trained)
        refuse_other_tokenizer(subject.tokenizer, manifest)
        data = read(subject)
        out = _open(config.out) if config.out is not None and rank == 0 else None
    scorer = Scorer(part, config.batch_size)
    facts = {"run": str(config.run.dir), "step": manifest.step, "layout": str(config.parallel.layout)}
    results = {name: evaluations()[name].measure(found, subject, scorer) for name, found in data.items()}
    for name, path in asked(config).items():
        print("\n".join(lines_of(f"{name}={path}", results[name])), file=console(), flush=True)
    if out is not None:
        figures = {name: {"path": path} | results[name].figures for name, path in asked(config).items()}
        with out:
            json.dump(facts | {"dtype": config.dtype} | figures, out, ensure_ascii=False, indent=1)
            out.write("\n")
    part.close()


def lines_of(title: str, result: Result) -> list[str]:
    """A result on the terminal."""
    return [title, *aligned(result.shown), *aligned(result.table)]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Cells in columns, the first one flush left and the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([f"  {first:<{widths[0]}}", *cells]))
    return lines


def _open(path: str) -> TextIO:
    try:
        return open(path, "w", encoding="utf-8")
    except OSError as error:
        raise ConfigError("out", path, f"can't be written ({error.strerror}); name another file") from None
