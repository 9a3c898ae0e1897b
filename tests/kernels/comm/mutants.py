"""The protocol with one part missing, and where a rank has to be late for it to show."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

from megapar.kernels._common import tl
from megapar.kernels.comm import exchange, symmetric
from megapar.kernels.comm import matmul as fused
from megapar.kernels.comm.symmetric import Channel
from tests.kernels.comm.operations import Shape
from tests.kernels.comm.skew import Place

SMALL: Shape = (5, 3, 4)
LARGE: Shape = (40, 3, 4)


@dataclass(frozen=True)
class Mutant:
    """missing: (kernel, primitive) that do nothing; patch: what else is replaced while it runs."""

    form: str
    late: int
    place: Place
    shows: str | tuple[str, ...]
    missing: frozenset[tuple[str, str]] = frozenset()
    patch: Callable[[], AbstractContextManager[Any]] = nullcontext
    shapes: tuple[Shape, ...] = (SMALL,)


def without(kernel: str, primitive: str, form: str, late: int, place: Place, shows: str) -> Mutant:
    return Mutant(form, late, place, shows, frozenset({(kernel, primitive)}))


def nothing(*of: Any) -> None:
    """A part that is missing."""


def any_begun(begun, epoch, *others):
    """`await_begun` that is content with any epoch."""
    AWAIT_BEGUN(begun, tl.minimum(epoch, 1), *others)


def any_mark(flag, mark, *others):
    """`await_flag` that is content with a flag of any epoch."""
    symmetric.await_epoch(flag, tl.minimum(symmetric.epoch_of(mark), 1), *others)


AWAIT_BEGUN = symmetric.await_begun  # as it was before any patch


@contextmanager
def replaced(name: str, function: Callable[..., None], *modules: Any) -> Iterator[None]:
    with ExitStack() as patches:
        for module in modules:
            patches.enter_context(mock.patch.object(module, name, function))
        yield


def one_half(of: str) -> AbstractContextManager[Any]:
    """Every epoch uses the half of epoch 0. of: flags_at or data_at."""
    address = getattr(Channel, of).fget
    return mock.patch.object(Channel, of, property(lambda channel: address(replace(channel, epoch=0))))


IDLE = "all_gather_matmul, idle"
# Where a rank is late: it has not yet told or written anything of this epoch, or it has not yet read what it was told.
BEFORE_WRITING, BEFORE_READING = (0, "begun"), (1, "launched")
MUTANTS = {
    # Waits. The handshake's is missed only by a rank that waits for nothing else, see `test_mutants`.
    "begin does not wait": Mutant(
        IDLE, 0, BEFORE_READING, "wrong", patch=lambda: replaced("await_begun", nothing, symmetric)
    ),
    "reduce does not wait": without("reduce_kernel", "await_flag", "all_reduce to all", 1, BEFORE_WRITING, "wrong"),
    "reduce of a product does not wait": without(
        "reduce_kernel", "await_flag", "matmul_reduce_scatter", 0, BEFORE_WRITING, "wrong"
    ),
    "collect does not wait": without(
        "collect_kernel", "await_flag", "matmul_all_reduce to owner", 1, BEFORE_READING, "wrong"
    ),
    "gathered product does not wait": without(
        "gathered_product_kernel", "await_flag", "all_gather_matmul", 1, BEFORE_WRITING, "wrong"
    ),
    # Signals
    "begin does not tell": Mutant(
        "matmul_reduce_scatter", 0, BEFORE_WRITING, "PeerTimeout",
        patch=lambda: replaced("tell_begun", nothing, symmetric),
    ),
    "push does not tell": without("push_kernel", "post", "all_reduce to all", 0, BEFORE_WRITING, "PeerTimeout"),
    "push of rows does not tell": without("push_kernel", "post", "all_gather_matmul", 0, BEFORE_WRITING, "PeerTimeout"),
    "product does not tell": without(
        "product_push_kernel", "post", "matmul_all_reduce to all", 0, BEFORE_WRITING, "PeerTimeout"
    ),
    "reduce does not tell": without("reduce_kernel", "post", "all_reduce to owner", 0, BEFORE_WRITING, "PeerTimeout"),
    # Epochs
    "no handshake": without("push_kernel", "begin", IDLE, 0, BEFORE_READING, "wrong"),
    "a handshake of any epoch": Mutant(
        IDLE, 0, BEFORE_READING, "wrong", patch=lambda: replaced("await_begun", any_begun, symmetric)
    ),
    "a flag of any epoch": Mutant(
        "all_reduce to all", 1, BEFORE_WRITING, "wrong",
        patch=lambda: replaced("await_flag", any_mark, exchange, fused),
    ),
    "data in one half": Mutant(
        "all_reduce to all", 0, BEFORE_READING, "wrong", patch=lambda: one_half("data_at")
    ),
    # Shows where shapes change: the rank without columns tells of its tile by a flag that is still awaited for another,
    # whose own word, which is older, may then take it back.
    "flags in one half": Mutant(
        IDLE, 0, BEFORE_WRITING, ("wrong", "PeerTimeout"), patch=lambda: one_half("flags_at"), shapes=(LARGE, SMALL)
    ),
}  # fmt: skip
