"""A kernel at one shape: what each provider runs there, and what our own kernels would launch.

Shapes are those of one layer of a model, on one sample.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megapar.kernels.shapes import Sizes

if TYPE_CHECKING:
    from megapar.kernels._common import Launch

MODES = ("forward", "backward", "full")


@dataclass(frozen=True)
class Runner:
    """One provider's kernel on tensors that it holds.

    forward: once, keeping what a backward needs
    backward: once, from what a forward returned, as often as one likes
    note: which of several ways of the provider's it is
    """

    forward: Callable[[], Any]
    backward: Callable[[Any], Any]
    note: str = ""


def differentiable(
    function: Callable[..., Any], inputs: Sequence[Tensor], grads: Sequence[Tensor], note: str = ""
) -> Runner:
    """A runner by autograd. grads: of what the function returns, a tensor or several."""
    leaves = [x.requires_grad_() for x in inputs]

    def forward() -> tuple[Tensor, ...]:
        outputs = function(*leaves)
        return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)

    def backward(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, leaves, grads, retain_graph=True)

    return Runner(forward, backward, note)


@dataclass(frozen=True)
class Work:
    """What a kernel can't do without.

    flops: floating-point operations, of which a special function is one
    bytes: what must come from memory or go there, if nothing does twice
    tensor_cores: whether the operations are matrix products
    dtype: of the operands
    """

    flops: float
    bytes: float
    tensor_cores: bool
    dtype: str

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes, self.tensor_cores, self.dtype)


@dataclass(frozen=True)
class Plan:
    """What our kernels launch in one mode, on tensors without storage.

    scratch: tensors that one launch writes for what follows, which an ideal kernel would not
    beside: what torch reads and writes beside the launches
    flops: the useful ones, where those are not all that the launches make
    """

    launches: "Sequence[Launch]"
    scratch: Sequence[Tensor] = ()
    beside: Sequence[Tensor] = ()
    tensor_cores: bool = False
    flops: float | None = None

    def work(self, dtype: str) -> Work:
        """Bytes are those of the launches' own metadata, but for scratch and for what a later launch reads again."""
        metadata = [launch.metadata() for launch in self.launches]
        flops = sum(value for one in metadata for key, value in one.items() if key.startswith("flops"))
        moved = sum(one["bytes"] for one in metadata) + sum(map(size, self.beside))
        known = {_place(x) for x in self.scratch}
        for launch in self.launches:
            tensors = {_place(x): x for x in launch.arguments.values() if isinstance(x, Tensor)}
            moved -= sum(size(x) for key, x in tensors.items() if key in known)
            known |= tensors.keys()
        return Work(flops if self.flops is None else self.flops, moved, self.tensor_cores, dtype)


@dataclass(frozen=True)
class Problem:
    """providers: by name, what makes the provider's runner; it imports the provider's library.

    plans: forward and backward of our kernels for an architecture, for a problem on the meta device.
    """

    providers: Mapping[str, Callable[[], Runner]]
    plans: Callable[[str], dict[str, Plan]]


# (sizes, tokens, dtype, device) -> a kernel's problem
Maker = Callable[[Sizes, int, str, str], Problem]


def _place(x: Tensor) -> tuple[Any, ...]:
    """Where a tensor begins: the same for a matrix and its transpose."""
    return x.untyped_storage()._cdata, x.storage_offset()


def size(x: Tensor) -> int:
    """Bytes."""
    return x.numel() * x.element_size()


def normal(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=device)
