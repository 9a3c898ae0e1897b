"""What an optimizer is to the rest of megapar: the state that it keeps of a parameter, and its update."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Settings(Protocol):
    """The keys of `optim` that rules read."""

    @property
    def beta1(self) -> float: ...
    @property
    def beta2(self) -> float: ...
    @property
    def eps(self) -> float: ...
    @property
    def momentum(self) -> float: ...


@dataclass(frozen=True)
class Run:
    """Neighbouring parameters, or parts of them: weight, grad and every state [n], all in the wide dtype.

    Updates write to all of them in place; what is left in `grad` is nobody's.
    """

    weight: Tensor
    grad: Tensor
    state: Mapping[str, Tensor]


@dataclass(frozen=True)
class Group:
    """Runs that are updated alike: with lr_scale times the step's learning rate, and this decoupled weight decay."""

    lr_scale: float
    weight_decay: float
    runs: Sequence[Run]


class Rule(Protocol):
    """An optimizer at work on groups of runs."""

    def update(self, lr: float, finite: Tensor) -> None:
        """One step. finite: bool [1] on the device; where it is false weights and state stay as they are, and nothing
        waits for its value."""

    def resume(self, steps: int) -> None:
        """So many updates have been made, and the state is theirs."""


# Gives every whole matrix, [rows, columns], whose parts stand in the gradients to a function, and puts the parts of
# what it returns in their place. Collective, whichever parts this rank has.
EachMatrix = Callable[[Callable[["Tensor"], "Tensor"]], None]


@dataclass(frozen=True)
class OptimizerKind:
    """An optimizer by name.

    about: one line
    state: names of the tensors that it keeps beside a weight, each as large as that
    make: (groups, settings, each_matrix) -> the rule at work
    others: None: it takes every parameter, element by element. A name: it takes the matrices of layers, whole ones
        through `each_matrix`, and all else goes by the optimizer of that name
    by_sign: a step has the same size for a gradient that is rounding alone, whose sign no layout shares with another
    """

    name: str
    about: str
    state: tuple[str, ...]
    make: Callable[[Sequence[Group], Settings, EachMatrix], Rule]
    others: str | None = None
    by_sign: bool = False


def keep_unless(finite: Tensor, runs: Sequence[Run], moment: str) -> None:
    """Where `finite` is false put a moment in the place of its gradient: averaged with itself, it stays as it is."""
    import torch

    for run in runs:
        torch.where(finite, run.grad, run.state[moment], out=run.grad)


def descend(group: Group, directions: list[Tensor], lr: float, finite: Tensor) -> None:
    """weight <- (1 - lr * weight_decay) * weight - lr * direction, which is overwritten; nothing if not `finite`.

    lr: that of the group
    """
    import torch

    weights = [run.weight for run in group.runs]
    applied = finite.squeeze(0).to(weights[0].dtype)
    keep: Tensor = 1.0 - lr * group.weight_decay * applied
    torch._foreach_mul_(weights, keep)
    torch._foreach_mul_(directions, -lr * applied)
    torch._foreach_add_(weights, directions)
