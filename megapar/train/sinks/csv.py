"""Tables for a spreadsheet, run.dir/steps.csv and run.dir/evaluations.csv: `logger=csv`."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from megapar.config.schema import TrainConfig
from megapar.train.sinks.sink import Sink, flat


class Csv(Sink):
    """A column per figure of the first row of a kind. A run that goes on begins with the rows of metrics.jsonl."""

    name = "csv"
    leaves = ("steps.csv", "evaluations.csv")

    @classmethod
    def wanted(cls, config: TrainConfig) -> bool:
        return config.logger.csv

    def start(self) -> None:
        self._folder = Path(str(self.config.run.dir))
        self._tables: dict[str, tuple[TextIO, Any]] = {}
        with open(self._folder / "metrics.jsonl", encoding="utf-8") as file:
            for line in file:
                if (row := json.loads(line))["step"] < self.first_step:
                    self.write(row)

    def write(self, row: Mapping[str, Any]) -> None:
        name = "steps" if "loss" in row else "evaluations" if "val_loss" in row else None
        if name is None:
            return
        figures = dict(flat(row))
        if name not in self._tables:
            new: TextIO = open(self._folder / f"{name}.csv", "w", newline="", encoding="utf-8")  # noqa: SIM115
            self._tables[name] = new, csv.DictWriter(new, list(figures), extrasaction="ignore")
            self._tables[name][1].writeheader()
        file, writer = self._tables[name]
        writer.writerow(figures)
        file.flush()

    def finish(self) -> None:
        for file, _ in self._tables.values():
            file.close()


SINK = Csv
