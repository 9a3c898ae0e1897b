"""Keeps what every rank did in the traced steps; rank 0 writes it when they are over."""

import json
from pathlib import Path

import torch

import megapar
from megapar.config.schema import TrainConfig
from megapar.config.stages import stage_layers
from megapar.mesh import Mesh
from megapar.parallel.agreement import gather_texts
from megapar.parallel.collectives import all_reduce
from megapar.schedule.actions import Schedule
from megapar.schedule.costs import write_costs
from megapar.trace import RankTrace, Span, Trace, clock_shifts, write

# To set the ranks' clocks by. Four ranks on two busy cores, whose clock is one, came out 0.3 ms apart (the worst pair;
# median of 60 times, 1.0 ms at most), by a single meeting 2 ms. Fifteen took 28 ms.
MEETINGS = 15


class Tracer:
    """Traces the steps `train.trace` from `first_step` on, where the run starts. Every rank calls it alike.

    Outside these steps it does nothing; spans are held in memory until the last of them is over.
    """

    def __init__(self, config: TrainConfig, mesh: Mesh, schedule: Schedule, first_step: int) -> None:
        assert config.train.trace is not None and config.run.dir is not None
        first, last = config.train.trace
        self.steps = range(max(first, first_step), last + 1)
        self.config, self.mesh, self.schedule, self.folder = config, mesh, schedule, Path(config.run.dir)
        self._meetings: list[tuple[float, float]] = []
        self._spans: dict[int, list[Span]] = {}

    def before(self, step: int) -> None:
        """Before a step: set the clocks where it is the first traced one."""
        if not self.steps or step != self.steps[0]:
            return
        self.mesh.timeline.take()  # what came before is no meeting
        for _ in range(MEETINGS):
            all_reduce(torch.zeros(1, device=self.mesh.device), self.mesh["world"])
        self._meetings = [(span.start, span.stop) for span in self.mesh.timeline.take()]

    def after(self, step: int, spans: list[Span]) -> None:
        """After a step: keep its spans, and write all where it is the last traced one. Collective then."""
        if step not in self.steps:
            return
        self._spans[step] = spans
        if step == self.steps[-1]:
            self._write()
            self._spans.clear()

    def moved(self, config: TrainConfig, schedule: Schedule) -> None:
        """From now on layers are on other stages: what is traced of before does not go with what comes."""
        self.config, self.schedule = config, schedule
        self._spans.clear()

    def _write(self) -> None:
        """trace.json and costs.json, from all ranks' spans on rank 0's clock."""
        mesh = self.mesh
        mine = {
            "meetings": self._meetings,
            "steps": [
                (step, [(span.kind, span.name, span.start, span.stop) for span in spans])
                for step, spans in self._spans.items()
            ],
        }
        texts = gather_texts(json.dumps(mine), mesh["world"], mesh.device)
        if mesh.rank != 0:
            return
        told = [json.loads(text) for text in texts]
        shifts = clock_shifts([each["meetings"] for each in told])
        ranks = []
        for rank, (each, (shift, _)) in enumerate(zip(told, shifts, strict=True)):
            steps = {
                step: [Span(kind, name, start - shift, stop - shift) for kind, name, start, stop in spans]
                for step, spans in each["steps"]
            }
            ranks.append(RankTrace(mesh.layout.coordinates(rank), steps))
        trace = Trace(
            layout=mesh.layout,
            name=self.config.pipeline.schedule if mesh.layout["pp"] > 1 else "1f1b",
            schedule=self.schedule,
            ranks=ranks,
            clock_error=sum(sorted(error for _, error in shifts)[-2:]),
            versions={"megapar": megapar.__version__, "torch": torch.__version__},
        )
        write(trace, self.folder / "trace.json")
        write_costs(trace.layer_costs(stage_layers(self.config)), self.folder / "costs.json")
