"""Runs the actions of one rank: the only code that walks a schedule with tensors.

Sends are asynchronous and never waited for before the end of the phase; receives are posted ahead, on every channel in
the order of its sends. A sent activation is released as soon as its transfer is over: backward needs its place in the
autograd graph, not its values. Neighbouring stages on one rank hand over without a transfer. Messages take their memory
from the allocator, which keeps what is freed (on a CPU: `megapar.launch.machine.keep_freed_memory`).
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megapar.mesh import Mesh
from megapar.parallel.weight_grad import WeightGrads
from megapar.pipeline.graphs import Graphs, shapes
from megapar.pipeline.passes import Forwarded, backward, forward
from megapar.pipeline.stage import Batch, Stage, Tensors, TensorSpec
from megapar.schedule.actions import Action, Schedule
from megapar.trace.announcements import described

# Receives in flight per channel: one being waited for and, on a CPU, one on its way. On a GPU each is a kernel that
# waits on its stream, and streams share a few hardware queues.
_POST_AHEAD = {"cpu": 2, "cuda": 1}


@dataclass
class _Receive:
    tensors: Tensors
    works: list[dist.Work] = field(default_factory=list)
    compare: list[Callable[[], None]] = field(default_factory=list)  # with what its sender says that it sends


class Executor:
    """Executes schedules on one pipeline rank.

    stages: this rank's stages by number. Every floating-point tensor that they send comes back as a gradient; one that
        a stage hands on untouched, such as an encoder's output along the decoder, has the sum of all its readers'.
    loss(outputs, batch): on the last stage, the scalar whose gradient is propagated.
    reduce(stage): finishes a stage's gradient reduction. Both are for training and may be left out without it.
    graphs: run from CUDA graphs what of a training step can be. Not the last micro-batch of a stage: what it completes
        is to be reduced while its backward still runs. Not while the timeline is detailed.
    """

    def __init__(
        self,
        stages: Mapping[int, Stage],
        mesh: Mesh,
        weight_grads: WeightGrads,
        loss: Callable[[Tensors, Batch], Tensor] | None = None,
        reduce: Callable[[int], None] = lambda stage: None,
        graphs: Graphs | None = None,
    ) -> None:
        self.graphs = graphs
        self.stages, self.mesh, self.weight_grads, self.loss, self.reduce = stages, mesh, weight_grads, loss, reduce

    def run(
        self,
        schedule: Schedule,
        batches: Sequence[Batch],
        head: Callable[[Tensors, Batch], Tensor] | None = None,
    ) -> list[Tensor]:
        """Execute this rank's row. Returns the losses by micro-batch, detached; empty unless it has the last stage.

        head(outputs, batch): what to return instead of the loss, in a schedule without backward.
        """
        self.mesh.connect(schedule.transfers)
        row = schedule.rows[self.mesh["pp"].index]
        training = any(action.kind in ("B", "I") for action in row)
        for stage in self.stages.values():
            stage.train(training)
        with self.mesh.timeline.span("phase", "pipeline"), torch.set_grad_enabled(training):
            phase = _Phase(self, schedule, batches, training, head or self.loss)
            phase.capture_graphs()
            phase.post_receives()
            for action in row:
                with self.mesh.timeline.span(action.kind, str(action)):
                    phase.actions[action.kind](action)
            phase.wait_for_sends()
        return [phase.losses[m] for m in sorted(phase.losses)]

    def rehearse(self, schedule: Schedule, batch: Batch) -> None:
        """Run each of this rank's stages once, forward and backward, on zeros in place of what others send.

        On a GPU that compiles the kernels: in a phase, others would wait for it with receives whose time runs. It adds
        to the main gradients, and nothing else of it stays.
        """
        assert self.loss is not None
        weight_grads = self.weight_grads
        on_added, weight_grads.on_added = weight_grads.on_added, lambda parameter: None
        try:
            for number, stage in sorted(self.stages.items(), reverse=True):  # as backward comes to them
                stage.train(True)
                received = self.nothing_received(number, batch)
                for tensor in received.values():
                    tensor.requires_grad_(tensor.is_floating_point())
                outputs = stage(received, batch)
                if number == schedule.stages - 1:
                    outputs = {"loss": self.loss(outputs, batch)}
                of_weights = [tensor for tensor in outputs.values() if tensor.requires_grad]
                torch.autograd.backward(of_weights, [torch.zeros_like(tensor) for tensor in of_weights])
        finally:
            weight_grads.on_added = on_added
            self.mesh.timeline.forget()

    def nothing_received(self, number: int, batch: Batch) -> Tensors:
        """Zeros in place of what a stage receives."""
        specs = self.stages[number].received(batch) if number else {}
        return {
            name: torch.zeros(spec.shape, dtype=spec.dtype, device=self.mesh.device) for name, spec in specs.items()
        }


class _Phase:
    """One pass through a row: what has arrived, what waits for its backward, what is on its way.

    A (stage, micro-batch) is the key of what belongs to one pass through one stage. `_arrived` holds what a stage needs
    from its neighbour by the action RECV_F or RECV_B, whether it was received or handed over on this rank.
    """

    def __init__(
        self,
        executor: Executor,
        schedule: Schedule,
        batches: Sequence[Batch],
        training: bool,
        head: Callable[[Tensors, Batch], Tensor] | None,
    ) -> None:
        self.executor, self.schedule, self.batches, self.training = executor, schedule, batches, training
        self.head, self.mesh, self.stages = head, executor.mesh, executor.stages
        self.index = self.mesh["pp"].index
        self.graphs = executor.graphs if training and not self.mesh.timeline.detailed else None
        self.row = schedule.rows[self.index]
        adding = [(action.stage, action.microbatch) for action in self.row if action.kind in ("B", "W")]
        self._first = set(dict(reversed(adding)).items())  # to a stage's main gradients
        self._last = set(dict(adding).items())
        self._split = {(action.stage, action.microbatch) for action in self.row if action.kind == "I"}
        self.losses: dict[int, Tensor] = {}
        self._arrived: dict[Action, Tensors] = {}
        self._outgoing: dict[Action, Tensors] = {}
        self._forwarded: dict[tuple[int, int], Forwarded] = {}
        self._posted: dict[Action, _Receive] = {}
        self._sends: list[tuple[dist.Work, Tensor]] = []
        self.actions: dict[str, Callable[[Action], None]] = {
            "F": self._forward,
            "B": self._backward,
            "I": self._input_gradient,
            "W": self._weight_gradients,
            "SEND_F": self._send,
            "SEND_B": self._send,
            "RECV_F": self._receive,
            "RECV_B": self._receive,
            "REDUCE": lambda action: executor.reduce(action.stage),
        }
        self._unposted = {
            (source, kind): deque(schedule.channel_order(source, self.index, kind))
            for kind in ("F", "B")
            for source in range(len(schedule.rows))
            if source != self.index
        }

    def post_receives(self) -> None:
        for channel in self._unposted:
            for _ in range(_POST_AHEAD[self.mesh.device.type]):
                self._post_receive(channel)

    def capture_graphs(self) -> None:
        """Those that this row's passes lack, with zeros for what others send. To be called before a receive is posted:
        a capture waits for the device."""
        graphs = self.graphs
        if graphs is None or (key := (self.row, *map(shapes, self.batches))) in graphs.prepared:
            return
        with graphs.capturing():
            for action in self.row:
                stage, kind, m = action
                if kind not in ("F", "B", "I", "W") or not self._from_graphs(action):
                    continue
                if kind == "F":
                    self._forward_from_graphs(graphs, stage, m, self.executor.nothing_received(stage, self.batches[m]))
                elif kind == "W":
                    graphs.weights(stage, m)
                else:
                    forwarded = graphs.forwarded(stage, m)
                    given = [torch.ones_like(forwarded.outputs[name]) for name in forwarded.names]
                    graphs.backward(stage, m, given, split=kind == "I")
        graphs.prepared.add(key)

    def _forward_from_graphs(self, graphs: Graphs, stage: int, m: int, received: Tensors) -> Tensors:
        variant = (stage, m) in self._first, (stage, m) in self._split
        return graphs.forward(stage, m, partial(self._compute, stage), received, self.batches[m], variant)

    def _forward(self, action: Action) -> None:
        stage, _, m = action
        received, batch = self._arrived.pop(Action(stage, "RECV_F", m), {}), self.batches[m]
        if graphs := self._from_graphs(action):
            outputs = self._forward_from_graphs(graphs, stage, m, received)
        else:
            forwarded = forward(lambda given: self._compute(stage, given, batch), received, self.training)
            outputs = forwarded.outputs
            if self.training:
                self._forwarded[stage, m] = forwarded
        if stage == self.schedule.stages - 1:
            self.losses[m] = outputs["loss"].clone() if self._from_graphs(action) else outputs["loss"]
        else:
            _check_sent(action, outputs, self.stages[stage].sent(batch))
            self._hand_over("F", action, outputs)

    def _compute(self, stage: int, received: Tensors, batch: Batch) -> Tensors:
        outputs = self.stages[stage](received, batch)
        if stage < self.schedule.stages - 1:
            return outputs
        assert self.head is not None, "the last stage needs a loss or a head"
        return {"loss": self.head(outputs, batch)}

    def _from_graphs(self, action: Action) -> Graphs | None:
        """What a pass runs from, as all its actions do. None: its operations are launched one by one."""
        return self.graphs if (action.stage, action.microbatch) not in self._last else None

    def _backward(self, action: Action) -> None:
        stage, kind, m = action
        arrived = self._arrived.pop(Action(stage, "RECV_B", m), {})
        if graphs := self._from_graphs(action):
            given = self._gradients(action, graphs.forwarded(stage, m), arrived)
            gradients = graphs.backward(stage, m, given, split=kind == "I")
        else:
            forwarded = self._forwarded.pop((stage, m))
            gradients = backward(forwarded, self._gradients(action, forwarded, arrived))
        if stage > 0:
            self._hand_over("B", action, gradients)

    def _gradients(self, action: Action, forwarded: Forwarded, arrived: Tensors) -> list[Tensor]:
        """Where backward begins, those of the outputs."""
        if action.stage == self.schedule.stages - 1:
            return [torch.ones_like(self.losses[action.microbatch])]
        return [arrived[name] for name in forwarded.names]

    def _input_gradient(self, action: Action) -> None:
        self.executor.weight_grads.defer((action.stage, action.microbatch))
        try:
            self._backward(action)
        finally:
            self.executor.weight_grads.defer(None)

    def _weight_gradients(self, action: Action) -> None:
        if graphs := self._from_graphs(action):
            graphs.weights(action.stage, action.microbatch)
        else:
            self.executor.weight_grads.run(action.stage, action.microbatch)

    def _neighbour(self, stage: int, kind: str) -> int:
        """The stage that a forward (F) or backward (B) pass through `stage` goes on to."""
        return stage + 1 if kind == "F" else stage - 1

    def _hand_over(self, kind: str, action: Action, tensors: Tensors) -> None:
        """To the next stage of the pass: kept for its SEND, or put where it looks if it lives here."""
        target = self._neighbour(action.stage, kind)
        if target in self.stages:
            self._arrived[Action(target, f"RECV_{kind}", action.microbatch)] = tensors
        else:
            self._outgoing[Action(action.stage, f"SEND_{kind}", action.microbatch)] = tensors

    def _send(self, action: Action) -> None:
        kind = action.kind[-1]
        self._sends = [(work, tensor) for work, tensor in self._sends if not work.is_completed()]
        target = self.schedule.rank_of(self._neighbour(action.stage, kind))
        group = self.mesh.channel(kind, self.index, target).group
        for name, tensor in sorted(self._outgoing.pop(action).items()):
            tensor = tensor.contiguous()
            if announcements := self.mesh.timeline.announcements:
                announcements.announce(_edge(kind, self.mesh.rank, self._rank(target)), described(name, tensor))
            with self.mesh["pp"].blocked(f"{action} of {name}"):
                work = dist.isend(tensor, self._rank(target), group=group)
            assert work is not None
            self._sends.append((work, tensor))

    def _rank(self, index: int) -> int:
        """The global rank of a pipeline rank."""
        return self.mesh["pp"].ranks[index]

    def _post_receive(self, channel: tuple[int, str]) -> None:
        if not self._unposted[channel]:
            return
        source, kind = channel
        action = self._unposted[channel].popleft()
        stage, batch = self.stages[action.stage], self.batches[action.microbatch]
        group = self.mesh.channel(kind, source, self.index).group
        specs = stage.received(batch) if kind == "F" else stage.sent(batch)
        receive = _Receive({})
        for name, spec in sorted(specs.items()):  # the order of sends
            if kind == "B" and not spec.dtype.is_floating_point:
                continue
            tensor = torch.empty(spec.shape, dtype=spec.dtype, device=self.mesh.device)
            receive.tensors[name] = tensor
            if announcements := self.mesh.timeline.announcements:
                edge, sender = _edge(kind, self._rank(source), self.mesh.rank), [self._rank(source)]
                number, what = announcements.expect(edge), described(name, tensor)
                receive.compare.append(partial(announcements.compare, edge, number, what, sender))
            work = dist.irecv(tensor, self._rank(source), group=group)
            assert work is not None
            receive.works.append(work)
        self._posted[action] = receive

    def _receive(self, action: Action) -> None:
        kind = action.kind[-1]
        # Receives come back from their neighbour: a forward's from stage - 1, a backward's from stage + 1.
        source = self.schedule.rank_of(self._neighbour(action.stage, "B" if kind == "F" else "F"))
        while action not in self._posted:
            self._post_receive((source, kind))
        receive = self._posted.pop(action)
        with self.mesh["pp"].blocked(f"{action} from rank {self._rank(source)}"):
            for work in receive.works:
                work.wait()
        for compare in receive.compare:
            compare()
        self._arrived[action] = receive.tensors
        self._post_receive((source, kind))

    def wait_for_sends(self) -> None:
        with self.mesh["pp"].blocked("the last sends"):
            for work, _ in self._sends:
                work.wait()
        self._sends.clear()


def _edge(kind: str, source: int, target: int) -> str:
    """The name of what a rank sends to another in forward (F) or backward (B) passes."""
    return f"{kind} from rank {source} to rank {target}"


def _check_sent(action: Action, outputs: Tensors, specs: Mapping[str, TensorSpec]) -> None:
    """Raise ValueError unless a stage gives what it says it sends: the next one has posted receives for that."""
    given = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in outputs.items()}
    declared = {name: (tuple(spec.shape), spec.dtype) for name, spec in specs.items()}
    if given != declared:
        raise ValueError(f"{action} gave {given}, and the stage's `sent` says {declared}; make them agree")
