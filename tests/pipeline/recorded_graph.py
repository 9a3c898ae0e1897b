"""A CUDA graph without CUDA: operations are recorded at torch's dispatcher, with the very memory that they work on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class RecordedGraph:
    """As CUDA's: a capture computes nothing that stays, and a replay reads and writes the memory of the capture.

    On a CPU what is captured runs all the same, so what it has written to memory from outside is taken back.
    """

    def __init__(self, pool: Any = None) -> None:
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    @contextmanager
    def capture(self) -> Iterator[None]:
        mode = _Recording(self)
        with mode:
            yield
        for tensor, before in mode.before.values():
            tensor.data.copy_(before)

    def replay(self) -> None:
        with torch.no_grad():
            for function, args, kwargs, outputs in self.calls:
                inputs = tuple(_tensors((args, kwargs)))
                with torch.autograd._unsafe_preserve_version_counter(inputs):  # autograd sees no replay
                    results = _tensors(function(*args, **kwargs))
                for kept, new in zip(outputs, results, strict=True):
                    if kept.data_ptr() != new.data_ptr():
                        kept.data.copy_(new)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]


class _Recording(TorchDispatchMode):
    def __init__(self, graph: RecordedGraph) -> None:
        super().__init__()
        self.graph = graph
        self.made: set[int] = set()  # storages
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # flat views of storages from outside, and what they held
        self._kept: list[Any] = []
        self._computed: set[int] = set()  # storages

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.ops.aten._local_scalar_dense.default and not self._is_of_host(args[0]):
            raise RuntimeError("a capture can't wait for the device")
        if function._schema.is_mutable:
            for tensor in _tensors((args, kwargs)):
                self._keep(tensor)
        outputs = function(*args, **kwargs)
        known = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(outputs):
            if (place := tensor.untyped_storage().data_ptr()) not in known:
                self.made.add(place)
            if not all(map(self._is_of_host, _tensors((args, kwargs)))):
                self._computed.add(place)
        self._kept.append(outputs)  # memory of a graph is not given to others
        self.graph.calls.append((function, args, kwargs, [one.detach() for one in _tensors(outputs)]))
        return outputs

    def _is_of_host(self, tensor: Tensor) -> bool:
        """Whether on a GPU this would be a number of the host, as a batch's are: of no dimension, from outside and no
        floating point, as weights and losses are, or computed from such numbers alone."""
        outside = tensor.untyped_storage().data_ptr() not in self.made
        if tensor.dim() or (outside and tensor.is_floating_point()):
            return False
        return tensor.untyped_storage().data_ptr() not in self._computed

    def _keep(self, tensor: Tensor) -> None:
        place = tensor.untyped_storage().data_ptr()
        if place in self.made or place in self.before:
            return
        whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
        self.before[place] = whole, whole.clone()
