"""Losses and gradient norms that stand out of those of the last steps: `run.spike_z`, `run.on_spike`."""

import json
import math
from typing import TYPE_CHECKING, Any

from megapar.config.schema import TrainConfig
from megapar.parallel.agreement import broadcast_text
from megapar.train.hooks.hook import Hook, Seen
from megapar.train.metrics import global_loss, rows_before
from megapar.train.spikes import FIGURES, Window

if TYPE_CHECKING:
    from megapar.train.loop import Loop


class Spikes(Hook):
    """All ranks judge the same figures by the same window, so they decide alike; a run that goes on reads its window
    from the rows. With `skip` that is before the update: it costs a gather of all ranks' losses and the gradient norm
    once more, and on a GPU a wait for both.
    """

    order = 12

    def __init__(self, loop: "Loop") -> None:
        super().__init__(loop)
        run = loop.config.run
        self.skip = run.on_spike == "skip"
        self.window = Window(run.spike_z, self.skip)
        self.found: dict[int, dict[str, Any]] = {}  # by step

    @classmethod
    def wanted(cls, config: TrainConfig) -> bool:
        return config.run.spike_z > 0

    def start(self) -> None:
        loop, text = self.loop, None
        if not loop.start.goes_on:
            return
        if loop.writer is not None:
            kept = (*FIGURES, "spike")
            rows = rows_before(loop.folder, loop.start.step - 1, "loss")
            text = json.dumps([{key: row[key] for key in kept if key in row} for row in rows])
        mesh = loop.trainer.mesh
        for row in json.loads(broadcast_text(text, mesh["world"], mesh.device) or "[]"):
            self.window.again(row)

    def on_reduced(self, step: int) -> None:
        if self.skip:
            trainer = self.loop.trainer
            loss = global_loss(float(trainer.under_way.loss), trainer.mesh)
            self._judge(step, loss, float(trainer.optimizer.grad_norm()))
            trainer.under_way.leave_out = step in self.found and self.found[step]["skipped"]

    def read(self, seen: Seen) -> dict[str, Any]:
        if not self.skip:
            self._judge(seen.step, seen.loss, seen.grad_norm)
        if (spike := self.found.pop(seen.step, None)) is None:
            return {}
        if self.loop.writer is not None:
            scores = ", ".join(f"{name} {spike[f'{name}_z']:.1f}" for name in FIGURES)
            first, last = spike["samples"]
            done = "; its update is left out" if spike["skipped"] else ""
            self.loop.writer.say(f"step {seen.step:>6}  spike: robust z of {scores}; samples {first} to {last}{done}")
        return {"spike": spike}

    def _judge(self, step: int, loss: float, norm: float) -> None:
        """Of what isn't finite nothing is asked: it makes no update in any case."""
        if math.isfinite(loss) and math.isfinite(norm) and (spike := self.window.judge(loss, norm)) is not None:
            size = self.loop.config.train.global_batch_size
            self.found[step] = {**spike, "samples": [(step - 1) * size, step * size - 1]}


HOOK = Spikes
