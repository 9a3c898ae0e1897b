"""Writes down every collective, transfer and new group that passes through `torch.distributed`.

Nothing is known here of who calls. The functions are replaced in the module, so a caller must look them up there
(`dist.all_reduce(...)`). A fake group gives a collective's own operand back as if every peer had the same, and leaves
what is received as it is; here that becomes zeros, so that nothing depends on what fresh memory holds.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor

# function -> what it calls the tensors that are this rank's own: those it gives, or, of a receive, those it waits for
_OPERANDS = {
    "all_reduce": "tensor",
    "reduce": "tensor",
    "broadcast": "tensor",
    "gather": "tensor",
    "all_gather": "tensor",
    "all_gather_single": "input_tensor",
    "all_gather_into_tensor": "input_tensor",
    "reduce_scatter": "input_list",
    "reduce_scatter_single": "input",
    "reduce_scatter_tensor": "input",
    "all_to_all": "input_tensor_list",
    "all_to_all_single": "input",
    "send": "tensor",
    "isend": "tensor",
    "recv": "tensor",
    "irecv": "tensor",
}
# What could pass unseen: a replay that meets one of these must first learn to write it down.
_UNKNOWN = (
    "barrier", "monitored_barrier", "batch_isend_irecv", "broadcast_object_list", "all_gather_object", "gather_object",
    "scatter_object_list", "send_object_list", "recv_object_list", "all_reduce_coalesced", "all_gather_coalesced",
    "new_subgroups", "scatter",
)  # fmt: skip


@dataclass
class Operation:
    """One line of a plan. text(name of a group) -> how it reads."""

    group: dist.ProcessGroup
    text: Callable[[str], str]


@dataclass
class Recording:
    """What was called, in order. groups: made by `new_group`, with what else was asked of them."""

    groups: list[tuple[dist.ProcessGroup, str]] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)

    def take(self) -> list[Operation]:
        """The operations since the last time."""
        taken, self.operations = self.operations, []
        return taken


class _Work:
    """A transfer in flight whose wait is written down."""

    def __init__(self, work: dist.Work, waited: Callable[[], None]) -> None:
        self._work, self._waited = work, waited

    def wait(self, *args: Any) -> Any:
        self._waited()
        return self._work.wait(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


@contextmanager
def recording() -> Iterator[Recording]:
    """Write down what is called inside."""
    found = Recording()
    depth = [0]  # one function of torch may call another

    def watched(name: str) -> Callable[..., Any]:
        original = getattr(dist, name)
        signature = inspect.signature(original)

        def call(*args: Any, **kwargs: Any) -> Any:
            if depth[0]:
                return original(*args, **kwargs)
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            depth[0] += 1
            try:
                work = original(*args, **kwargs)
            finally:
                depth[0] -= 1
            return _note(found, name, bound.arguments, work)

        return call

    def unknown(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(f"torch.distributed.{name} is not written down yet: tests/plan/recorder.py")

        return call

    patched: dict[str, Any] = {name: watched(name) for name in _OPERANDS if hasattr(dist, name)}
    patched |= {name: unknown(name) for name in _UNKNOWN if hasattr(dist, name)}
    with mock.patch.multiple(dist, **patched, new_group=_new_group(found)):
        yield found


def _new_group(found: Recording) -> Callable[..., Any]:
    original = dist.new_group

    def new_group(*args: Any, **kwargs: Any) -> Any:
        group = original(*args, **kwargs)
        options = {name: value for name, value in kwargs.items() if name != "ranks" and value is not None}
        found.groups.append((group, ", ".join(f"{name}={value}" for name, value in sorted(options.items()))))
        return group

    return new_group


def _note(found: Recording, name: str, arguments: dict[str, Any], work: Any) -> Any:
    tensors = _tensors(arguments[_OPERANDS[name]])
    if name in ("recv", "irecv"):
        tensors[0].zero_()
    group: Any = arguments.get("group") or dist.group.WORLD
    elements = sum(tensor.numel() for tensor in tensors)
    place = _peer(arguments, group)
    size = f"{str(tensors[0].dtype).removeprefix('torch.')} {elements} = {elements * tensors[0].element_size()} B"
    op = arguments.get("op", dist.ReduceOp.SUM)
    kind = name if op == dist.ReduceOp.SUM else f"{name}({str(op).split('.')[-1].rstrip('>').lower()})"
    starts = bool(arguments.get("async_op")) or name.startswith("i")
    start = f"start {kind}" if starts and not name.startswith("i") else kind
    found.operations.append(Operation(group, lambda axis: f"{start} {axis}{place} {size}"))
    if not starts or name == "isend":  # when a send is over is nothing that a plan knows
        return work
    waited = Operation(group, lambda axis: f"wait {kind} {axis}{place}")
    return _Work(work, lambda: found.operations.append(waited))


def _peer(arguments: dict[str, Any], group: dist.ProcessGroup) -> str:
    """The one other rank that an operation names, as its place in the group."""
    for name in ("dst", "src"):
        if arguments.get(f"group_{name}") is not None:
            return f"[{arguments[f'group_{name}']}]"
        if arguments.get(name) is not None:
            return f"[{dist.get_process_group_ranks(group).index(arguments[name])}]"
    return ""


def _tensors(value: Tensor | list[Tensor]) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)
