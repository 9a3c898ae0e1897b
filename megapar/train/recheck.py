"""A step's gradients computed twice and compared bit for bit: arithmetic that goes wrong without an error.

Our operations are deterministic, so the same micro-batches give the same bits. While a step is checked every operation
that torch runs leaves digests of what it returns, and of operands that peers sent: the first difference on a rank says
whether it computed something else from what it had, or got something else from a peer that did.
"""

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megapar.parallel.agreement import gather_texts
from megapar.parallel.digest import digest
from megapar.pipeline.stage import Batch
from megapar.train.rollback import RollBack
from megapar.train.trainer import Trainer

COMPUTED, RECEIVED = range(2)  # how a difference came: where it began it was computed
_UNFILLED = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"}

_GIVES = {"allreduce_", "send"}  # operations with peers whose operands hold what this rank gives them


@dataclass(frozen=True)
class Operation:
    """What torch ran. where: the parameter that it read or wrote, or else the last one before; results: how many.

    Its digests are one of all operands that peers sent, then one for each result; what a rank gives to its peers counts
    as one.
    """

    name: str
    where: str
    results: int


class _Parameters:
    """Which parameter memory belongs to, its own or its main gradient's."""

    def __init__(self, trainer: Trainer) -> None:
        places = []
        for parameter in trainer.context.parameters:
            for tensor in (parameter.tensor, parameter.grad):
                if tensor.numel():
                    first = tensor.data_ptr()
                    places.append((first, first + tensor.numel() * tensor.element_size(), parameter.name))
        self.places = sorted(places)
        self.starts = [first for first, _, _ in self.places]

    def name(self, tensor: Tensor) -> str | None:
        place = bisect_right(self.starts, tensor.data_ptr()) - 1
        return self.places[place][2] if place >= 0 and tensor.data_ptr() < self.places[place][1] else None


class Traced(TorchDispatchMode):
    """Notes every operation that runs inside, with digests."""

    def __init__(self, parameters: _Parameters, device: torch.device) -> None:
        super().__init__()
        self._nothing = torch.zeros((), dtype=torch.int64, device=device)
        self.operations: list[Operation] = []
        self.digests: list[Tensor] = []
        self._parameters, self._where = parameters, "the first layer"
        self._received: set[int] = set()  # storages that peers write to

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.is_view:
            return func(*args, **(kwargs or {}))
        name, given = func._overloadpacket.__name__, _tensors((args, kwargs))
        received = [digest(one) for one in given if _storage(one) in self._received]
        if func.namespace != "aten":
            self._note(name, received, given if name in _GIVES else [])
            self._received |= set(map(_storage, given))
            return func(*args, **(kwargs or {}))
        self._where = next((found for one in given if (found := self._parameters.name(one))), self._where)
        result = func(*args, **(kwargs or {}))
        made = _tensors(result)
        self._received -= set(map(_storage, made)) - set(map(_storage, given))
        self._note(name, received, [] if name in _UNFILLED else made)
        return result

    def _note(self, name: str, received: list[Tensor], results: list[Tensor]) -> None:
        self.digests += [sum(received, self._nothing), *map(digest, results)]
        self.operations.append(Operation(name, self._where, len(results)))


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@dataclass(frozen=True)
class Computation:
    """One computation of a step on this rank. gradients: (parameter, digest), the sum of losses the last; digests: of
    the operations, one operation behind the other."""

    operations: list[Operation]
    digests: list[int]
    gradients: list[tuple[str, int]]

    def difference(self, other: "Computation") -> tuple[int, str] | None:
        """How and where the other one began to differ on this rank; None if no gradient and no loss does."""
        names = [name for (name, one), (_, two) in zip(self.gradients, other.gradients, strict=True) if one != two]
        if not names:
            return None
        at = 0
        for one, two in zip_longest(self.operations, other.operations):
            if one is None or two is None or (one.name, one.results) != (two.name, two.results):
                return COMPUTED, f"at {(one or two).where}"
            mine, theirs = (of.digests[at : at + 1 + one.results] for of in (self, other))
            if mine[1:] != theirs[1:]:
                return RECEIVED if mine[0] != theirs[0] else COMPUTED, f"in {one.name.rstrip('_')} at {one.where}"
            at += len(mine)
        return COMPUTED, f"in the gradient of {names[0]}"


def compute(trainer: Trainer, batches: Sequence[Batch]) -> tuple[list[Tensor], Computation]:
    """Losses, and what was computed; main gradients are those of this rank's own micro-batches then."""
    for gradients in trainer.buffers.grads:
        gradients.zero_()
    trainer.mesh.timeline.forget()
    with Traced(_Parameters(trainer), trainer.mesh.device) as traced:
        losses = trainer.local_gradients(batches)
    parameters = [parameter for bucket in trainer.buffers.buckets for parameter in bucket.offsets]
    last = [digest(torch.stack(losses))] if losses else []
    names = [parameter.name for parameter in parameters] + ["the loss"] * len(last)
    of_gradients = _values([digest(parameter.grad) for parameter in parameters] + last)
    digests = _values(traced.digests)
    return losses, Computation(traced.operations, digests, list(zip(names, of_gradients, strict=True)))


def _values(digests: list[Tensor]) -> list[int]:
    return torch.stack(digests).tolist() if digests else []


@dataclass(frozen=True)
class Fault:
    """The ranks where two computations began to differ, and where that was on the first of them."""

    ranks: list[int]
    where: str

    @property
    def text(self) -> str:
        return f"rank{'s' if len(self.ranks) > 1 else ''} {', '.join(map(str, self.ranks))} {self.where}"


def fault_between(one: Computation, other: Computation, trainer: Trainer) -> Fault | None:
    """None if they are the same on every rank. Collective, and the same on all."""
    said = gather_texts(json.dumps(one.difference(other)), trainer.mesh["world"], trainer.mesh.device)
    found = {rank: difference for rank, difference in enumerate(map(json.loads, said)) if difference is not None}
    if not found:
        return None
    least = min(how for how, _ in found.values())
    ranks = [rank for rank, (how, _) in found.items() if how == least]
    return Fault(ranks, found[ranks[0]][1])


def checked_gradients(trainer: Trainer, batches: Sequence[Batch], step: int) -> tuple[list[Tensor], Fault | None]:
    """Losses, with gradients as `Trainer.gradients` makes them; and a fault that a third computation has outvoted.

    Collective. Costs one more forward and backward, passes over all results of both for their digests, and reductions
    that wait until all is computed. Raises RollBack, on all ranks alike, if no two of three computations agree.
    """
    _, first = compute(trainer, batches)
    losses, second = compute(trainer, batches)
    fault = fault_between(first, second, trainer)
    if fault is not None:
        losses, third = compute(trainer, batches)
        later = fault_between(second, third, trainer)
        if later is not None:
            fault = fault_between(first, third, trainer)
            if fault is not None:
                problem = f"three computations of its gradients give three results, first {later.text}"
                raise RollBack(f"step {step}: {problem}; test that machine, or leave it out")
            fault = later
    for stage in trainer.stages:
        trainer.sync.finish(stage)
    return losses, fault
