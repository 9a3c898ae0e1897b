"""Keeps what every rank did in the traced steps; rank 0 writes it when they are over."""

import json
from typing import TYPE_CHECKING

import torch

import megapar
from megapar.config.errors import UserError
from megapar.config.stacks import stacks
from megapar.config.stages import stage_layers, stage_names
from megapar.parallel.agreement import gather_texts
from megapar.parallel.collectives import all_reduce
from megapar.schedule.costs import write_costs
from megapar.trace.file import RankTrace, write
from megapar.trace.file import Trace as RunTrace
from megapar.trace.spans import Span, clock_shifts
from megapar.train.hooks.hook import Hook
from megapar.train.trainer import Step

if TYPE_CHECKING:
    from megapar.train.loop import Loop

# To set the ranks' clocks by. Four ranks on two busy cores, whose clock is one, came out 0.3 ms apart (the worst pair;
# median of 60 times, 1.0 ms at most), by a single meeting 2 ms. Fifteen took 28 ms.
MEETINGS = 15


class Trace(Hook):
    """Traces the steps `train.trace`, from the run's first step on. Outside these steps it does nothing; spans are in
    memory until the last of them is over."""

    order = 40  # behind the checkpoint: the state is safe before anything is made of times

    def __init__(self, loop: "Loop") -> None:
        super().__init__(loop)
        assert loop.config.train.trace is not None
        first, last = loop.config.train.trace
        self.steps = range(max(first, loop.start.step), last + 1)
        self._meetings: list[tuple[float, float]] = []
        self._done: dict[int, Step] = {}

    def before(self, step: int) -> None:
        """Set the clocks before the first traced step, and time traced ones in detail."""
        mesh = self.loop.trainer.mesh
        mesh.timeline.detailed = step in self.steps
        if not self.steps or step != self.steps[0]:
            return
        mesh.timeline.forget()  # what came before is no meeting
        for _ in range(MEETINGS):
            all_reduce(torch.zeros(1, device=mesh.device), mesh["world"])
        self._meetings = [(span.start, span.stop) for span in mesh.timeline.take()]

    def after(self, step: int, done: Step) -> None:
        """Keep a traced step, and write all behind the last one."""
        if step not in self.steps:
            return
        self._done[step] = done
        if step == self.steps[-1]:
            self._write()
            self._done.clear()

    def moved(self) -> None:
        """What is traced of before does not go with what comes."""
        self._done.clear()

    def _write(self) -> None:
        """trace.json, and costs.json of layers that are alike, from all ranks' spans on rank 0's clock."""
        mesh, config = self.loop.trainer.mesh, self.loop.config
        mine = {
            "meetings": self._meetings,
            "steps": [
                (step, [(span.kind, span.name, span.start, span.stop) for span in done.spans])
                for step, done in self._done.items()
            ],
        }
        texts = gather_texts(json.dumps(mine), mesh["world"], mesh.device)
        if mesh.rank != 0:
            return
        payloads = [json.loads(text) for text in texts]
        shifts = clock_shifts([each["meetings"] for each in payloads])
        ranks = []
        for rank, (each, (shift, _)) in enumerate(zip(payloads, shifts, strict=True)):
            steps = {
                step: [Span(kind, name, start - shift, stop - shift) for kind, name, start, stop in spans]
                for step, spans in each["steps"]
            }
            ranks.append(RankTrace(mesh.layout.coordinates(rank), steps))
        trace = RunTrace(
            layout=mesh.layout,
            name=config.pipeline.schedule if mesh.layout["pp"] > 1 else "1f1b",
            schedule=self.loop.trainer.schedule,
            ranks=ranks,
            clock_error=sum(sorted(error for _, error in shifts)[-2:]),
            versions={"megapar": megapar.__version__, "torch": torch.__version__},
            parts=tuple(stage_names(config)) if mesh.layout["pp"] > 1 else (),
        )
        try:
            write(trace, self.loop.folder / "trace.json")
            if len(stacks(config.model)) == 1:  # layers of several are not alike
                write_costs(trace.layer_costs(stage_layers(config)), self.loop.folder / "costs.json")
        except (UserError, OSError) as error:  # no reason to end a run
            if self.loop.writer is not None:
                self.loop.writer.say(f"trace       none: {error}")


HOOK = Trace
