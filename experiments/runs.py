"""Finished runs as a `results.py` reads them, and the table that it writes into a README."""

import json
import shlex
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

from megapar.config.errors import UserError
from megapar.config.file import load
from megapar.config.keys import changed
from megapar.config.run_sections import TrainRunConfig
from megapar.config.schema import ParallelConfig, PipelineConfig, TrainConfig

MATCH = "match.json"  # in a run's folder
EARLY = 20  # steps before rounding has grown
BEGIN, END = "<!-- figures: begin, by results.py -->", "<!-- figures: end -->"


@dataclass(frozen=True)
class Run:
    """A finished run, as its folder tells it. facts: environment.json; rows: metrics.jsonl"""

    folder: Path
    config: TrainConfig
    overrides: list[str]
    facts: dict[str, Any]
    rows: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """Raises UserError for a folder without a finished run."""
        if not (folder / "summary.json").exists():
            raise UserError(f"{folder}: no finished run (no summary.json); give the run.dir of one")
        config = load(TrainConfig, folder / "config.yaml")
        overrides = yaml.safe_load((folder / "overrides.yaml").read_text(encoding="utf-8"))
        facts = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        return cls(folder, config, overrides, facts, rows)

    def last(self, figure: str) -> float:
        """A figure behind the last step. Raises UserError where there is none."""
        found = [row[figure] for row in self.rows if row.get(figure) is not None]
        if not found:
            raise UserError(f"{self.folder}: no {figure} in metrics.jsonl; train with train.eval_every above 0")
        return float(found[-1])

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The rows of steps."""
        return [row for row in self.rows if "loss" in row]

    @property
    def minutes(self) -> float:
        """Of all steps, evaluations apart."""
        return float(sum(row["step_time_s"] for row in self.steps)) / 60

    @property
    def layout(self) -> str:
        return str(self.config.parallel.layout)

    @property
    def commit(self) -> str:
        git = self.facts["git"]
        return "none" if git is None else git["revision"][:10] + " with changes" * git["dirty"]

    @property
    def command(self) -> str:
        return f"megapar train {shlex.join(self.overrides)}"


def exact_match(run: Run) -> float:
    """The share of held-out lines that a run answers word for word, by its match.json. Raises UserError."""
    path = run.folder / MATCH
    if not path.exists():
        raise UserError(f"{path}: missing; write it with `megapar eval {run.folder} match=valid.jsonl out={path}`")
    return float(json.loads(path.read_text(encoding="utf-8"))["match"]["exact_match"])


def share_of(shares: Sequence[float]) -> str:
    """Their mean, with the standard deviation of several."""
    return f"{mean(shares):.1%}" + (f" ± {stdev(shares):.1%}" if len(shares) > 1 else "")


def agreements(runs: Sequence[Run], figure: str, unit: str, per: str = "token") -> list[str]:
    """How far apart losses, in nats per what is said, and a figure at the end, are of runs that differ in nothing but
    their layout."""
    lines = []
    for one, two in combinations(runs, 2):
        if one.layout == two.layout or _without_layout(one) != _without_layout(two):
            continue
        pairs = list(zip(one.steps, two.steps, strict=True))
        apart = [abs(first["loss"] - second["loss"]) for first, second in pairs]
        lines.append(
            f"Seed {one.config.train.seed}, {one.layout} beside {two.layout}: losses of the first {len(apart[:EARLY])} "
            f"steps differ by at most {max(apart[:EARLY]):.1e} nats/{per}, of all {len(apart)} by {max(apart):.1e}, "
            f"{unit} at the end by {abs(one.last(figure) - two.last(figure)):.1e}."
        )
    return [*lines, ""] if lines else []


def _without_layout(run: Run) -> TrainConfig:
    one = replace(run.config, parallel=ParallelConfig(), pipeline=PipelineConfig(), run=TrainRunConfig())
    return changed(one, {"train.micro_batch_size": 1, "train.trace": None})


def machines(runs: Sequence[Run]) -> str:
    """The processors that runs were made on."""
    found = {(run.facts["cpu"]["model"], run.facts["cpu"]["cores"]) for run in runs}
    return "; ".join(f"{model}, {cores} core{'s' if cores > 1 else ''}" for model, cores in sorted(found))


def commands(runs: Sequence[Run]) -> list[str]:
    """The machine, and the commands of runs, in their order."""
    machine = f"Machine: {machines(runs)}. Commands, in the order of the runs above:"
    return [machine, "```", *(run.command for run in runs), "```"]


def between(text: str, new: str) -> str:
    """`text` with what is between its markers replaced. Raises UserError where it has none."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UserError(f"the README has no lines {BEGIN} and {END}; put them where the table belongs")
    return f"{before}{BEGIN}\n{new}\n{END}{after}"


def write_table(arguments: Sequence[str], readme: Path, figures: Callable[[list[Run]], str]) -> int:
    """The command line of a `results.py`: `RUN... [--readme FILE]`. Returns the exit code."""
    parser = ArgumentParser(prog="results.py", description="Write the table of finished runs into a README.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--readme", type=Path, default=readme, help="file to write into, between its markers")
    chosen = parser.parse_args(arguments)
    try:
        text = figures([Run.read(folder) for folder in chosen.runs])
        chosen.readme.write_text(between(chosen.readme.read_text(encoding="utf-8"), text), encoding="utf-8")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(chosen.readme)
    return 0
