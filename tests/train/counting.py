"""What a step asks of a GPU, counted on a CPU: at torch's dispatcher, and where Triton's kernels are launched."""

from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megapar.kernels import _common

# They make, name or cut tensors, and run nothing on a GPU.
_FREE = {
    "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "lift_fresh", "new_empty",
    "permute", "reshape", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind",
    "unsqueeze", "view", "_unsafe_view", "_reshape_alias", "unfold", "resize_", "set_",
}  # fmt: skip


class Counted(TorchDispatchMode):
    """By name. kernels: torch's; bytes: what they write; launches: Triton's; syncs: what has the host wait for a GPU.

    Numbers of the host, as a batch's step, count as syncs too: here every tensor is the host's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self._inside = 0  # a Triton kernel that is interpreted is made of torch's operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__
        if self._inside or func.namespace != "aten" or name in _FREE:
            return result
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero") or _by_mask(name, args):
            self.syncs[name] += 1
            return result
        self.kernels[name] += 1
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.bytes[name] += tensor.numel() * tensor.element_size()
        return result


def _by_mask(name: str, args: tuple[Any, ...]) -> bool:
    """Whether an index is a mask, whose true elements the host must count."""
    if name not in ("index", "index_put", "index_put_"):
        return False
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])


def counted(run: Callable[[], Any]) -> Counted:
    found, launch = Counted(), _common.Launch.run

    def noted(self: _common.Launch) -> None:
        found.launches[self.kernel.fn.__name__] += 1
        found._inside += 1
        try:
            launch(self)
        finally:
            found._inside -= 1

    with mock.patch.object(_common.Launch, "run", noted), found:
        run()
    return found
