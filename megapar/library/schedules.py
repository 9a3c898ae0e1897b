"""A pipeline schedule to look at: `megapar.schedule("zbv", ranks=4, microbatches=16)`. Without torch."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from megapar.config.errors import ConfigError
from megapar.config.keys import changed
from megapar.config.parse import parse
from megapar.report.config import CostsConfig, ScheduleConfig
from megapar.report.schedules import Candidate, compare, draw
from megapar.schedule.actions import COMPUTE
from megapar.schedule.table import as_text, write


class Picture(str):
    """SVG text that a notebook shows as a picture."""

    def _repr_svg_(self) -> str:
        return str(self)


class ScheduleView:
    """A schedule that was built, proven and replayed at the costs asked for.

    rows: of each rank its computations in order, such as "2F0": stage 2, forward, micro-batch 0
    step_time: in the unit of the costs (F = I = W = 1 unless given)
    bubble: idle share of the step, mean over ranks, 0 to 1
    peak: most activations on a rank, in micro-batches of a whole rank
    """

    def __init__(self, config: ScheduleConfig, found: Candidate) -> None:
        self._config, self._found = config, found
        simulation = found.simulation
        self.name, self.ranks, self.microbatches, self.chunks = (
            found.name,
            config.stages,
            config.microbatches,
            found.chunks,
        )
        self.step_time, self.bubble, self.peak = simulation.step_time, simulation.mean_bubble, found.peak
        self.rows = [[str(action) for action in row if action.kind in COMPUTE] for row in found.schedule.rows]

    def draw(self, path: str | Path | None = None) -> Picture:
        """The timeline as SVG, shown in a notebook. path: a file to write it to, .svg or .html. Raises ConfigError."""
        if path is not None:
            if not str(path).endswith((".svg", ".html")):
                raise ConfigError("draw", path, "draws .svg or .html; name a file that ends so")
            Path(path).write_text(self._drawn(str(path)), encoding="utf-8")
        return Picture(self._drawn(".svg"))

    def csv(self, path: str | Path | None = None) -> str:
        """The table as text, a row per rank, which `pipeline.schedule=csv:PATH` reads. path: a file to write it to."""
        if path is not None:
            write(self._found.schedule, str(path))
        return as_text(self._found.schedule)

    def _drawn(self, name: str) -> str:
        return draw(changed(self._config, {"plot": name}), self._found)

    def _repr_svg_(self) -> str:
        return self.draw()

    def __repr__(self) -> str:
        return (
            f"{self.name}: {self.ranks} ranks of {self.chunks} stage{'s' if self.chunks > 1 else ''}, "
            f"{self.microbatches} micro-batches, step {self.step_time:g}, bubble {self.bubble:.1%}, "
            f"peak {self.peak:g} micro-batches"
        )


def schedule(name: str, *, ranks: int, microbatches: int, chunks: int | None = None, **costs: Any) -> ScheduleView:
    """The schedule of that name (or `csv:PATH`, or `auto`) for so many pipeline ranks and micro-batches.

    chunks: stages per rank; default: the schedule's own
    costs: by the names of the keys `costs.*` of `megapar schedule`: F, I, W, transfer, latency, head, ...; default:
        F = I = W = 1, and nothing else takes time
    Raises ConfigError, one line.
    """
    known = asdict(CostsConfig())
    if unknown := [key for key in costs if key not in known]:
        raise ConfigError(unknown[0], costs[unknown[0]], f"unknown; there are chunks, {', '.join(known)}")
    if name == "all":
        raise ConfigError("schedule", name, "name one: this is a single schedule; `megapar schedule` compares them")
    sizes = {"stages": ranks, "microbatches": microbatches, "chunks": chunks}
    try:
        config = parse(ScheduleConfig, {"pipeline": {"schedule": name}, "costs": costs, **sizes})
        [found] = compare(config).candidates
    except ConfigError as error:
        said = {"stages": "ranks", "pipeline.schedule": "schedule"}.get(error.key)
        if said is None:
            raise
        line = str(error)
        raise ConfigError(said, ranks if said == "ranks" else name, line.partition(": ")[2]) from None
    return ScheduleView(config, found)
