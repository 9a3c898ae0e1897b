"""Evaluations on the held-out split: before the first step, every `train.eval_every` steps, and after the last one."""

from collections import deque
from typing import TYPE_CHECKING, Any

from megapar.train.hooks.hook import Hook
from megapar.train.metrics import gather_figures, rows_before, totals
from megapar.train.trainer import Step

if TYPE_CHECKING:
    from megapar.train.loop import Loop

MOST = 1000  # evaluations that are kept for the summary; metrics.jsonl has them all


class Evaluate(Hook):
    order = 20

    def __init__(self, loop: "Loop") -> None:
        super().__init__(loop)
        self.first: dict[str, Any] | None = None
        self.recent: deque[dict[str, Any]] = deque(maxlen=MOST)

    def start(self) -> None:
        """A run that goes on in its own directory has its evaluations so far there."""
        done = self.loop.start.step - 1
        if self.loop.start.goes_on and self.loop.writer is not None:
            for row in rows_before(self.loop.folder, done, "val_loss"):
                self._keep(row)
        if self.loop.config.train.eval_every and not self.loop.start.goes_on:
            self._evaluate(done)

    def after(self, step: int, done: Step) -> None:
        train = self.loop.config.train
        if train.eval_every and (step % train.eval_every == 0 or step == train.steps):
            self.loop.settle()
            self._evaluate(step)

    def finish(self) -> dict[str, Any]:
        """evaluations: the first, and the last MOST of those behind it."""
        return {"evaluations": [] if self.first is None else [self.first, *self.recent]}

    def _evaluate(self, step: int) -> None:
        trainer = self.loop.trainer
        figures = gather_figures(trainer.evaluate(), trainer.mesh)
        if self.loop.writer is not None:
            measured = totals(figures)
            row = {"step": step, "val_loss": measured[0], **trainer.task.figures(measured)}
            self._keep(row)
            self.loop.writer.evaluation(row)

    def _keep(self, row: dict[str, Any]) -> None:
        if self.first is None:
            self.first = row
        else:
            self.recent.append(row)


HOOK = Evaluate
