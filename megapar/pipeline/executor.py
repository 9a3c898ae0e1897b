"""Runs the actions of one rank: the only code that walks a schedule with tensors.

Sends are asynchronous and never waited for before the end of the phase; receives are posted ahead. A sent activation is
released as soon as its transfer is over: backward needs its place in the autograd graph, not its values.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megapar.mesh import Axis, Mesh
from megapar.parallel.weight_grad import WeightGrads
from megapar.schedule.actions import Action, Schedule

Tensors = dict[str, Tensor]
Batch = dict[str, Tensor]

_POST_AHEAD = 2  # receives in flight per direction: one being waited for, one on its way


@dataclass
class _Receive:
    tensors: Tensors
    works: list[dist.Work] = field(default_factory=list)


@dataclass
class _Forwarded:
    """What backward needs of a forward pass."""

    received: Tensors
    edges: list[GradientEdge]
    names: list[str]


class Executor:
    """Executes schedules on one pipeline rank that holds one stage.

    stage: a module with forward(received, batch) -> tensors for the next stage, `received(batch)` (specs of what it
        receives) and `sent(batch)` (of what it sends, which is also what comes back as gradients).
    loss(outputs, batch): on the last stage, the scalar whose gradient is propagated.
    reduce(): finishes the stage's gradient reduction. Both are for training and may be left out without it.
    """

    def __init__(
        self,
        stage: nn.Module,
        mesh: Mesh,
        weight_grads: WeightGrads,
        loss: Callable[[Tensors, Batch], Tensor] | None = None,
        reduce: Callable[[], None] = lambda: None,
    ) -> None:
        self.stage, self.mesh, self.weight_grads, self.loss, self.reduce = stage, mesh, weight_grads, loss, reduce
        self.index = mesh["pp"].index
        self.channels: dict[str, Axis] = {}
        if mesh["pp"].size > 1:
            self.channels = {"F": mesh["pp"], "B": mesh["pp_backward"]}

    def run(
        self,
        schedule: Schedule,
        batches: Sequence[Batch],
        head: Callable[[Tensors, Batch], Tensor] | None = None,
    ) -> list[Tensor]:
        """Execute this rank's row. Returns the losses by micro-batch, detached; empty unless it is the last stage.

        head(outputs, batch): what to return instead of the loss, in a schedule without backward.
        """
        row = schedule.rows[self.index]
        training = any(action.kind in ("B", "I") for action in row)
        self.stage.train(training)
        with self.mesh.timeline.span("phase", "pipeline"), torch.set_grad_enabled(training):
            last = self.index == schedule.stages - 1
            phase = _Phase(self, row, batches, training, last, head or self.loss)
            for action in row:
                with self.mesh.timeline.span(action.kind, str(action)):
                    phase.actions[action.kind](action)
            phase.wait_for_sends()
        return [phase.losses[m] for m in sorted(phase.losses)]


class _Phase:
    """One pass through a row: what has arrived, what waits for its backward, what is on its way."""

    def __init__(
        self,
        executor: Executor,
        row: Sequence[Action],
        batches: Sequence[Batch],
        training: bool,
        last: bool,
        head: Callable[[Tensors, Batch], Tensor] | None,
    ) -> None:
        self.executor, self.batches, self.training, self.last, self.head = executor, batches, training, last, head
        self.mesh, self.stage, self.index = executor.mesh, executor.stage, executor.index
        self.losses: dict[int, Tensor] = {}
        self._arrived: dict[tuple[str, int], Tensors] = {}
        self._outgoing: dict[tuple[str, int], Tensors] = {}
        self._forwarded: dict[int, _Forwarded] = {}
        self._posted: dict[Action, _Receive] = {}
        self._sends: list[tuple[dist.Work, Tensor]] = []
        self.actions: dict[str, Callable[[Action], None]] = {
            "F": self._forward,
            "B": self._backward,
            "I": self._input_gradient,
            "W": lambda action: executor.weight_grads.run(action.microbatch),
            "SEND_F": lambda action: self._send("F", action, self.index + 1),
            "SEND_B": lambda action: self._send("B", action, self.index - 1),
            "RECV_F": lambda action: self._receive("F", action),
            "RECV_B": lambda action: self._receive("B", action),
            "REDUCE": lambda action: executor.reduce(),
        }
        self._unposted = {
            kind: iter([action for action in row if action.kind == f"RECV_{kind}"]) for kind in executor.channels
        }
        for kind in self._unposted:
            for _ in range(_POST_AHEAD):
                self._post_receive(kind)

    def _forward(self, action: Action) -> None:
        m = action.microbatch
        received = self._arrived.pop(("F", m), {})
        for tensor in received.values():
            tensor.requires_grad_(self.training and tensor.is_floating_point())
        batch = self.batches[m]
        outputs = self.stage(received, batch)
        if self.last:
            assert self.head is not None, "the last stage needs a loss or a head"
            loss = self.head(outputs, batch)
            self.losses[m] = loss.detach()
            outputs = {"loss": loss}
        else:
            self._outgoing["F", m] = {name: tensor.detach() for name, tensor in outputs.items()}
        if self.training:
            names = [name for name, tensor in outputs.items() if tensor.requires_grad]
            self._forwarded[m] = _Forwarded(received, [get_gradient_edge(outputs[name]) for name in names], names)

    def _backward(self, action: Action) -> None:
        m = action.microbatch
        forwarded = self._forwarded.pop(m)
        if self.last:
            grads = [torch.ones_like(self.losses[m])]
        else:
            arrived = self._arrived.pop(("B", m))
            grads = [arrived[name] for name in forwarded.names]
        torch.autograd.backward(forwarded.edges, grads)
        self._outgoing["B", m] = {
            name: tensor.grad if tensor.grad is not None else torch.zeros_like(tensor)
            for name, tensor in forwarded.received.items()
            if tensor.requires_grad
        }

    def _input_gradient(self, action: Action) -> None:
        self.executor.weight_grads.defer(action.microbatch)
        try:
            self._backward(action)
        finally:
            self.executor.weight_grads.defer(None)

    def _peer(self, stage: int) -> int:
        return self.mesh["pp"].ranks[stage]

    def _send(self, kind: str, action: Action, stage: int) -> None:
        self._sends = [(work, tensor) for work, tensor in self._sends if not work.is_completed()]
        for name, tensor in self._outgoing.pop((kind, action.microbatch)).items():
            tensor = tensor.contiguous()
            with self.mesh["pp"].blocked(f"{action} of {name}"):
                work = dist.isend(tensor, self._peer(stage), group=self.executor.channels[kind].group)
            assert work is not None
            self._sends.append((work, tensor))

    def _post_receive(self, kind: str) -> None:
        action = next(self._unposted[kind], None)
        if action is None:
            return
        peer = self._peer(self.index - 1 if kind == "F" else self.index + 1)
        if kind == "F":
            specs = self.stage.received(self.batches[action.microbatch])  # type: ignore[operator]
        else:
            specs = self.stage.sent(self.batches[action.microbatch])  # type: ignore[operator]
        receive = _Receive({})
        for name, spec in specs.items():
            tensor = torch.empty(spec.shape, dtype=spec.dtype, device=self.mesh.device)
            receive.tensors[name] = tensor
            work = dist.irecv(tensor, peer, group=self.executor.channels[kind].group)
            assert work is not None
            receive.works.append(work)
        self._posted[action] = receive

    def _receive(self, kind: str, action: Action) -> None:
        receive = self._posted.pop(action)
        with self.mesh["pp"].blocked(f"{action} from rank {self._peer(self.index + (-1 if kind == 'F' else 1))}"):
            for work in receive.works:
                work.wait()
        self._arrived[kind, action.microbatch] = receive.tensors
        self._post_receive(kind)

    def wait_for_sends(self) -> None:
        with self.mesh["pp"].blocked("the last sends"):
            for work, _ in self._sends:
                work.wait()
        self._sends.clear()
