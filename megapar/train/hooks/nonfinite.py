"""Steps whose gradients were not finite: where that began, and what happens after `run.nonfinite_limit` in a row."""

import math
from typing import TYPE_CHECKING, Any

from megapar.config.errors import UserError
from megapar.train.hooks.hook import Hook, Seen
from megapar.train.nonfinite import first_nonfinite
from megapar.train.rollback import RollBack

if TYPE_CHECKING:
    from megapar.train.loop import Loop


class NonFinite(Hook):
    """Nothing is looked at in a step that is finite.

    On a GPU figures are read while the next step is under way: it is that one's gradients that are looked at, or made
    again.
    """

    order = 11

    def __init__(self, loop: "Loop") -> None:
        super().__init__(loop)
        self.in_a_row = 0

    def read(self, seen: Seen) -> dict[str, Any]:
        """Raises UserError or RollBack, on all ranks alike, at the limit."""
        if math.isfinite(seen.grad_norm):
            self.in_a_row = 0
            return {}
        self.in_a_row += 1
        found = first_nonfinite(self.loop.trainer)
        nothing = "every gradient is finite, and the sum of their squares is not"
        if self.loop.trainer.mesh.device.type == "cuda":
            nothing = "by now every gradient is finite: these are the next step's"
        where = nothing if found is None else found.text
        if self.in_a_row >= self.loop.config.run.nonfinite_limit:
            self._give_up(seen.step, where)
        if self.loop.writer is not None:
            self.loop.writer.say(f"step {seen.step:>6}  skipped: {where}")
        return {} if found is None else {"nonfinite": found.row}

    def _give_up(self, step: int, where: str) -> None:
        run = self.loop.config.run
        count = f"{self.in_a_row} step{'s' if self.in_a_row > 1 else ''} in a row"
        problem = f"step {step}: {count} skipped, as gradients were not finite ({where})"
        if run.on_nonfinite == "rollback":
            raise RollBack(f"{problem}; run.on_nonfinite=rollback: back to the newest checkpoint")
        folder = self.loop.folder / "checkpoints"
        raise UserError(f"{problem}; lower optim.lr, or start from an earlier state: checkpoint.load={folder}/step-...")


HOOK = NonFinite
