"""CUDA graphs of what a rank's stages compute: captured once, replayed in every step.

A pass through a stage runs in a slot: tensors that stay where they are, and graphs of its forward pass and its backward
that read and write them. As many slots come about as micro-batches are under way at once, and others for the first of a
step, whose backward writes main gradients where those behind it add. Transfers, reductions and Python's part of a
backward (which main gradients are complete) stay outside. All are captured before a phase begins: a capture waits for
the device, and in a phase the device may wait for what other ranks send.

Source: NVIDIA's CUDA programming guide, "CUDA Graphs"; `torch.cuda.make_graphed_callables` for autograd in a capture.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from megapar.config.layout import AXES
from megapar.config.schema import TrainConfig
from megapar.parallel.weight_grad import LocalParameter, Submitted, WeightGrads
from megapar.pipeline.passes import Forwarded, backward, forward
from megapar.pipeline.stage import Batch, Tensors
from megapar.trace.clock import Timeline


def why_not(config: TrainConfig) -> str | None:
    """What forbids graphs in a run; None: nothing."""
    train, layout = config.train, config.parallel.layout
    samples = math.prod(size for name, size in layout.items() if AXES[name].splits == "samples")
    reasons = {
        f"train.device={train.device}": train.device != "cuda",
        f"tp={layout['tp']}: a stage's collectives are inside": layout["tp"] > 1,
        f"model.dropout={config.model.dropout:g}: its masks depend on the step": config.model.dropout > 0,
        "interpret: what is seen is copied": bool(config.interpret.capture or config.interpret.statistics),
        f"task.name={config.task.name}: its loss also measures, outside of the graphs": config.task.name == "policy",
        "images and sound: every micro-batch has another shape": config.model.has_media,
        "one micro-batch a step, and the last one runs without": (
            train.global_batch_size == train.micro_batch_size * samples
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


class Graph(Protocol):
    """What runs inside `capture` is recorded and not run; `replay` runs it."""

    def capture(self) -> AbstractContextManager[None]: ...
    def replay(self) -> None: ...


class CudaGraph:
    """pool: of the memory that the graphs of a slot share; they never run at once."""

    def __init__(self, pool: Any) -> None:
        self.graph, self.pool = torch.cuda.CUDAGraph(), pool

    @contextmanager
    def capture(self) -> Iterator[None]:
        # thread_local: NCCL's watchdog may ask the device things meanwhile that a capture forbids.
        with torch.cuda.graph(self.graph, pool=self.pool, capture_error_mode="thread_local"):
            yield

    def replay(self) -> None:
        self.graph.replay()


@dataclass
class _Captured:
    """A graph, what it leaves, and what Python has to do at each replay: main gradients that were `written` hold
    something from then on, `added` have got one more contribution."""

    graph: Graph
    result: Any = None
    written: set[LocalParameter] = field(default_factory=set)
    added: list[LocalParameter] = field(default_factory=list)


@dataclass
class _Slot:
    """Static tensors of a pass, and its graphs. submitted: weight gradients that its I has put off."""

    number: int
    pool: Any
    received: Tensors
    batch: Batch
    grads: list[Tensor] = field(default_factory=list)
    submitted: list[Submitted] = field(default_factory=list)
    graphs: dict[str, _Captured] = field(default_factory=dict)  # by kind of action

    @property
    def forwarded(self) -> Forwarded:
        return self.graphs["F"].result


class Graphs:
    """Runs the passes of a rank's stages from graphs. captured: how many there are.

    new_pool, new_graph: make what a slot's graphs share, and a graph in it
    """

    def __init__(
        self,
        weight_grads: WeightGrads,
        timeline: Timeline,
        new_pool: Callable[[], Any] = lambda: torch.cuda.graph_pool_handle(),
        new_graph: Callable[[Any], Graph] = CudaGraph,
    ) -> None:
        self.weight_grads, self.timeline = weight_grads, timeline
        self.new_pool, self.new_graph = new_pool, new_graph
        self.captured = self._slots = 0
        self.prepared: set[Hashable] = set()  # what `capturing` has been through, as its callers call it
        self._capturing = False
        self._free: dict[Hashable, dict[int, _Slot]] = defaultdict(dict)
        self._busy: dict[tuple[int, int], tuple[Hashable, _Slot]] = {}

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """The calls inside capture what they lack and replay nothing. They are a phase's, whole and in its order."""
        weight_grads, before = self.weight_grads, set(self.weight_grads.left_over)
        self._capturing = True
        try:
            yield
        finally:
            self._capturing = False
            weight_grads.left_over = before
        assert not self._busy, "a pass without its backward"

    def forwarded(self, stage: int, microbatch: int) -> Forwarded:
        """A forward pass whose backward is to come."""
        return self._busy[stage, microbatch][1].forwarded

    def forward(
        self,
        stage: int,
        microbatch: int,
        compute: Callable[[Tensors, Batch], Tensors],
        received: Tensors,
        batch: Batch,
        variant: Hashable,
    ) -> Tensors:
        """The outputs, in memory that the next pass in the same slot will use.

        variant: passes with different ones have graphs of their own: those that find other main gradients empty, and
            those whose backward is split
        """
        key = (stage, variant, shapes(received), shapes(batch))
        free = self._free[key]
        # The lowest number: so a step's passes meet the same slots, and the graphs that these have.
        slot = free.pop(min(free)) if free else self._new_slot(received, batch)
        self._busy[stage, microbatch] = key, slot
        _load(slot.received, received)
        _load(slot.batch, batch)
        return self._run(
            slot, "F", lambda: forward(lambda given: compute(given, slot.batch), slot.received, True)
        ).outputs

    def backward(self, stage: int, microbatch: int, grads: Sequence[Tensor], *, split: bool) -> Tensors:
        """The gradients of what was received, in memory of their own. split: weight gradients follow in `weights`."""
        key, slot = self._busy[stage, microbatch]
        if not slot.grads:
            slot.grads = [torch.empty_like(grad) for grad in grads]
        for static, grad in zip(slot.grads, grads, strict=True):
            static.copy_(grad)

        def compute() -> Tensors:
            if not split:
                return backward(slot.forwarded, slot.grads)
            self.weight_grads.defer((stage, microbatch))
            try:
                return backward(slot.forwarded, slot.grads)
            finally:
                self.weight_grads.defer(None)
                slot.submitted = self.weight_grads.withdraw(stage, microbatch)

        result = self._run(slot, "I" if split else "B", compute)
        if not split:
            self._release(stage, microbatch, key, slot)
        return {name: grad.clone() for name, grad in result.items()}

    def weights(self, stage: int, microbatch: int) -> None:
        """The weight gradients that a split backward has put off."""
        key, slot = self._busy[stage, microbatch]
        self._run(slot, "W", lambda: self.weight_grads.run_all(slot.submitted))
        self._release(stage, microbatch, key, slot)

    def _new_slot(self, received: Tensors, batch: Batch) -> _Slot:
        static = {name: torch.empty_like(tensor) for name, tensor in received.items()}
        self._slots += 1
        return _Slot(self._slots, self.new_pool(), static, {name: tensor.clone() for name, tensor in batch.items()})

    def _release(self, stage: int, microbatch: int, key: Hashable, slot: _Slot) -> None:
        del self._busy[stage, microbatch]
        self._free[key][slot.number] = slot

    def _run(self, slot: _Slot, name: str, compute: Callable[[], Any]) -> Any:
        if self._capturing and name not in slot.graphs:
            slot.graphs[name] = self._capture(slot.pool, compute)
        captured = slot.graphs[name]
        empty = self.weight_grads.left_over.intersection(captured.added)
        assert empty == captured.written, "captured with other main gradients empty"
        self.weight_grads.left_over -= captured.written
        if not self._capturing:
            captured.graph.replay()
            for parameter in captured.added:
                self.weight_grads.on_added(parameter)
        return captured.result

    def _capture(self, pool: Any, compute: Callable[[], Any]) -> _Captured:
        """With Python's part noted and not done: the replay that follows does it."""
        weight_grads, captured = self.weight_grads, _Captured(self.new_graph(pool))
        on_added, before = weight_grads.on_added, set(weight_grads.left_over)
        weight_grads.on_added = captured.added.append
        try:
            with self.timeline.muted(), captured.graph.capture():
                captured.result = compute()
        finally:
            weight_grads.on_added = on_added
        captured.written = before - weight_grads.left_over
        weight_grads.left_over = before
        self.captured += 1
        return captured


def shapes(tensors: Tensors) -> Hashable:
    """What graphs are made for. Of a number of the host the value: it goes into kernels as an argument."""
    return tuple(
        (name, tuple(tensor.shape), tensor.dtype, tensor.item() if _of_host(tensor) else None)
        for name, tensor in sorted(tensors.items())
        if name != "step"  # read by dropout alone, which graphs can't have
    )


def _of_host(tensor: Tensor) -> bool:
    return tensor.dim() == 0 and tensor.device.type == "cpu"


def _load(static: Tensors, given: Tensors) -> None:
    for name, tensor in given.items():
        if not _of_host(tensor):
            static[name].data.copy_(tensor)  # as a graph writes it: no change that autograd would see
