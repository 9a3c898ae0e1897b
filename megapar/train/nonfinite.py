"""Where a step's gradients ceased to be finite."""

import json
from dataclasses import dataclass
from typing import Any

from megapar.parallel.agreement import gather_texts
from megapar.parallel.buffers import StageBuffers
from megapar.train.trainer import Trainer


@dataclass(frozen=True)
class Found:
    """The parameter that backward came to first of those with gradients that are not finite, the ranks whose gradient
    of it is not, and how many values aren't on the first of them. Several ranks: what each has had of it can't be told.
    """

    parameter: str
    ranks: list[int]
    count: int

    @property
    def row(self) -> dict[str, Any]:
        return {"parameter": self.parameter, "ranks": self.ranks, "count": self.count}

    @property
    def text(self) -> str:
        """`rank 1 has 3 non-finite values in the gradient of layers.1.mlp.down.weight`."""
        several = len(self.ranks) > 1
        who = f"rank{'s' if several else ''} {', '.join(map(str, self.ranks))} {'have' if several else 'has'}"
        values = f"{self.count} non-finite value{'s' if self.count > 1 else ''}"
        return f"{who} {values} in the gradient of {self.parameter}"


def first_nonfinite(trainer: Trainer) -> Found | None:
    """Of the step whose gradients are there; None if all are finite. Collective, and the same on all ranks.

    Where several ranks have it, as after a sum, the step's gradients are made again without sums, which names the rank
    that it comes from: one more forward and backward. The weights must be those of the step; gradients are overwritten.
    """
    found = _agreed(trainer)
    if found is None or len(found.ranks) == 1 or trainer.mesh.data.size == 1:
        return found
    trainer.local_gradients(trainer.under_way.batches)
    return _agreed(trainer) or found  # what does not come again is left with all ranks of the sum


def _agreed(trainer: Trainer) -> Found | None:
    said = gather_texts(json.dumps(_first_here(trainer.buffers)), trainer.mesh["world"], trainer.mesh.device)
    of_ranks = {rank: first for rank, first in enumerate(map(json.loads, said)) if first is not None}
    if not of_ranks:
        return None
    where = min((stage, number) for stage, number, _, _ in of_ranks.values())
    ranks = [rank for rank, (*place, _, _) in of_ranks.items() if tuple(place) == where]
    _, _, name, count = of_ranks[ranks[0]]
    return Found(name, ranks, count)


def _first_here(buffers: StageBuffers) -> tuple[int, int, str, int] | None:
    """(stage, number in it, name, how many values) of the first one on this rank, numbers as backward comes to them:
    the last stage's are the smallest."""
    numbers: dict[int, int] = {}
    found = []
    for held in buffers.held():
        stage = held.parameter.stage
        numbers[stage] = numbers.get(stage, 0) + 1
        count = int(held.view(buffers.grads).isfinite().logical_not().sum())
        if count:
            found.append((-stage, numbers[stage], held.piece.record.name, count))
    return min(found, default=None)
