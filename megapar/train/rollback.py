"""An error that an earlier state mends."""

from typing import TYPE_CHECKING

from megapar.config.errors import UserError
from megapar.parallel.replicas import unequal_replicas

if TYPE_CHECKING:
    from megapar.train.trainer import Trainer


class RollBack(UserError):
    """The run can't go on from this state, but from an earlier one: with `run.max_restarts` it goes on from its newest
    checkpoint. kind: by which a launcher knows it."""

    kind = "rollback"


def refuse_unequal_replicas(trainer: "Trainer", step: int) -> None:
    """Raise RollBack, on all ranks alike, if copies of a parameter that must be equal differ. Collective."""
    buffers = [trainer.buffers] if trainer.frozen is None else [trainer.buffers, trainer.frozen]
    if unequal := unequal_replicas(buffers, trainer.mesh):
        more = f" (and {len(unequal) - 1} more)" if len(unequal) > 1 else ""
        problem = f"step {step}: copies of a parameter differ: {unequal[0].text}{more}"
        raise RollBack(f"{problem}; test that machine, and go back to the newest checkpoint: the same command does")
