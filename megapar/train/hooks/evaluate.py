"""Evaluations on the held-out split: before the first step, every `train.eval_every` steps, and after the last one."""

from typing import TYPE_CHECKING, Any

from megapar.train.hooks.hook import Hook
from megapar.train.metrics import gather_figures, local_figures, total_loss
from megapar.train.trainer import Step

if TYPE_CHECKING:
    from megapar.train.loop import Loop


class Evaluate(Hook):
    order = 20

    def __init__(self, loop: "Loop") -> None:
        super().__init__(loop)
        self.rows: list[dict[str, Any]] = []

    def start(self) -> None:
        if self.loop.config.train.eval_every:
            self._evaluate(self.loop.first_step - 1)

    def after(self, step: int, done: Step) -> None:
        train = self.loop.config.train
        if train.eval_every and (step % train.eval_every == 0 or step == train.steps):
            self.loop.settle()
            self._evaluate(step)

    def finish(self) -> dict[str, Any]:
        return {"evaluations": self.rows}

    def _evaluate(self, step: int) -> None:
        trainer = self.loop.trainer
        figures = gather_figures(local_figures(trainer.evaluate(), []), trainer.mesh)
        if self.loop.writer is not None:
            loss = total_loss(figures)
            row = {"step": step, "val_loss": loss, **trainer.task.figures(loss)}
            self.rows.append(row)
            self.loop.writer.evaluation(row)


HOOK = Evaluate
