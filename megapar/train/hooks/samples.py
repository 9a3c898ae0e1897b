"""What ranks read: every `run.samples_every` steps, samples that several of them have are compared bit for bit."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megapar.config.errors import UserError
from megapar.config.layout import Layout
from megapar.config.schema import TrainConfig
from megapar.parallel.agreement import gather_texts
from megapar.parallel.digest import digest
from megapar.parallel.replicas import Unequal
from megapar.pipeline.stage import Batch
from megapar.train.hooks.hook import Hook, Seen

if TYPE_CHECKING:
    from megapar.train.loop import Loop

Digests = Mapping[str, list[int]]  # of every micro-batch of a rank, by tensor


class Samples(Hook):
    order = 18

    def __init__(self, loop: "Loop") -> None:
        super().__init__(loop)
        self._hashes: dict[int, str] = {}  # by step, until its row is written

    @classmethod
    def wanted(cls, config: TrainConfig) -> bool:
        return config.run.samples_every > 0

    def on_reduced(self, step: int) -> None:
        """Before the update. Raises UserError, on all ranks alike, if ranks that share samples have read others."""
        if step % self.loop.config.run.samples_every:
            return
        trainer = self.loop.trainer
        mine = json.dumps(digests(trainer.under_way.batches))
        everyones = [json.loads(text) for text in gather_texts(mine, trainer.mesh["world"], trainer.mesh.device)]
        if (found := unequal(everyones, trainer.mesh.layout)) is not None:
            problem = "compare the files of data there, or test that machine"
            raise UserError(f"step {step}: ranks that share samples have read others: {found.text}; {problem}")
        self._hashes[step] = hash_of(everyones)

    def read(self, seen: Seen) -> dict[str, str]:
        """samples: a hash of all that the step has read; the same in every layout that has the same micro-batches.

        Of a task that reads what models say (dpo, policy) that is part of it, with the rounding of the layout."""
        found = self._hashes.pop(seen.step, None)
        return {} if found is None else {"samples": found}


def digests(batches: Sequence[Batch]) -> dict[str, list[int]]:
    """Of a rank's micro-batches. Of tensors that are empty none, as they are on stages that read no media."""
    found: dict[str, list[Tensor]] = {}
    for batch in batches:
        for name, values in batch.items():
            if values.numel():
                found.setdefault(name, []).append(digest(values))
    return {name: torch.stack(parts).tolist() for name, parts in found.items()}


def unequal(everyones: Sequence[Digests], layout: Layout) -> Unequal | None:
    """The first tensor of which ranks that are parts of the same replica have read other values, if there is one."""
    read: dict[tuple[str, int], dict[int, list[int]]] = {}
    for rank, found in enumerate(everyones):
        replica = layout.replica(layout.coordinates(rank))
        for name, values in found.items():
            read.setdefault((name, replica), {})[rank] = values
    for (name, _), of_ranks in sorted(read.items()):
        if any(values != next(iter(of_ranks.values())) for values in of_ranks.values()):
            return Unequal.of(name, {rank: tuple(values) for rank, values in of_ranks.items()})
    return None


def hash_of(everyones: Sequence[Digests]) -> str:
    """16 hexadecimal digits. Who has read what is no part of it, nor how many have."""
    names = sorted({name for found in everyones for name in found})
    read = {name: sorted({value for found in everyones for value in found.get(name, [])}) for name in names}
    return hashlib.sha256(json.dumps(read).encode()).hexdigest()[:16]


HOOK = Samples
