"""Update rules over a rank's buckets, whole or ZeRO-1-sharded, with clipping by the global norm."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megapar.config.errors import UserError
from megapar.config.model import part_options
from megapar.config.schema import OptimConfig, PartOptions
from megapar.optim.matrices import WholeMatrices
from megapar.optim.state import Runs, size_of, zeros
from megapar.parallel.buffers import Held, StageBuffers
from megapar.parallel.collectives import all_reduce
from megapar.update_rules import optimizer_kind
from megapar.update_rules.kind import Group, OptimizerKind, Rule, Run


@dataclass(frozen=True)
class StepResult:
    """grad_norm: before clipping. skipped: it was not finite or the update was left out; no rank changed anything."""

    grad_norm: float
    skipped: bool

    @classmethod
    def of(cls, grad_norm: float, left_out: bool = False) -> "StepResult":
        return cls(grad_norm, left_out or not math.isfinite(grad_norm))


def sum_of_squares(runs: Sequence[Tensor], device: torch.device) -> Tensor:
    """[1] fp64: of all elements, accumulated in fp64.

    In fp32 a sum's error grows with its length: `torch._foreach_norm` was 1e-5 off at a million elements. On a CPU a
    piece at a time is widened into one buffer: 10 ms for 10 million elements, where torch's own fp64 norm takes 44. The
    sum of a piece is torch's and not BLAS's dot, whose bits depend on the number of threads.
    """
    total = torch.zeros(1, dtype=torch.float64, device=device)
    if device.type != "cpu":
        return (
            total + torch.stack(torch._foreach_norm(list(runs), dtype=torch.float64)).square().sum() if runs else total
        )
    buffer = torch.empty(min(_PIECE, max(map(len, runs), default=0)), dtype=torch.float64)
    for piece in (piece for run in runs for piece in run.split(_PIECE)):
        wide = buffer[: len(piece)].copy_(piece)
        total += wide.square_().sum()
    return total


_PIECE = 1 << 15  # elements, a quarter of a MB: in the cache between its uses; torch sums them in one thread


@dataclass(frozen=True)
class Treatment:
    """How a parameter is updated: by which rule, with the options of its part, with weight decay or without."""

    rule: str
    options: PartOptions
    decays: bool

    @classmethod
    def of(cls, held: Held, config: OptimConfig) -> "Treatment":
        """Raises UserError where there are groups by part, and the parameter is of none."""
        local, kind = held.parameter, optimizer_kind(config.name)
        if config.groups and local.part is None:
            problem = f"{local.name} belongs to no part of the model; set context.part while it is built"
            raise UserError(f"optim.groups: {problem}, or leave groups out")
        options = PartOptions() if local.part is None else part_options(config, local.part.name)
        others = None if is_matrix(held) else kind.others
        return cls(others or kind.name, options, held.piece.record.decays)

    def group(self, runs: list[Run], config: OptimConfig) -> Group:
        own = self.options.weight_decay
        decay = config.weight_decay if own is None else own
        return Group(self.options.lr_scale, decay if self.decays else 0.0, runs)


class Optimizer:
    """The update rules of `optim.name` on what this rank owns of every bucket.

    grads: the owned gradients by bucket, the same memory every step; after a step they hold nothing of use. Master
    weights are at least fp32; where the compute dtype is that wide and nothing is sharded they are the parameters
    themselves, else a copy of the owned part. Which parameter is updated how is said in `Treatment.of` alone.
    Making one is collective where a rule works on whole matrices.
    """

    def __init__(self, buffers: StageBuffers, grads: Sequence[Tensor], config: OptimConfig) -> None:
        self.buffers, self.grads, self.config = buffers, list(grads), config
        wide = buffers.context.wide_dtype
        self.masters = [
            part.to(wide, copy=buffers.zero or part.dtype != wide) for part in buffers.take_owned(buffers.params)
        ]
        self._made = torch.zeros((), dtype=torch.int64, device=buffers.context.device)
        self._states: dict[str, Sequence[Tensor] | Sequence[Runs]] = {}
        self.rules: list[Rule] = []
        treated = buffers.owned_runs(lambda held: Treatment.of(held, config))
        for kind in kinds_of(config):
            self._begin(kind, {way: runs for way, runs in treated.items() if way.rule == kind.name})
        counted = buffers.owned_runs(lambda held: held.counted).get(True, [])
        self._counted = [self.grads[bucket][run] for bucket, run in counted]

    def _begin(self, kind: OptimizerKind, treated: Mapping[Treatment, list[tuple[int, slice]]]) -> None:
        """Make a rule and the state of what it updates."""
        chosen = runs_with_state(self.buffers, self.config, kind)
        state = {name: zeros(self.masters, chosen) for name in kind.state}
        self._states |= state

        def run_of(bucket: int, run: slice) -> Run:
            of_run = {name: parts[bucket][run] for name, parts in state.items()}
            found = {name: values for name, values in of_run.items() if values is not None}
            return Run(self.masters[bucket][run], self.grads[bucket][run], found)

        groups = [way.group([run_of(*run) for run in runs], self.config) for way, runs in treated.items()]
        if kind.others is not None:
            matrices = WholeMatrices(self.buffers, is_matrix)
            self.rules.append(kind.make(groups, self.config, partial(matrices.each, self.grads)))
        elif groups:  # with ZeRO-1 a rank may own nothing that goes by it
            self.rules.append(kind.make(groups, self.config, _no_matrices))

    @property
    def steps(self) -> int:
        """Updates made so far (skipped steps make none)."""
        return int(self._made)

    @steps.setter
    def steps(self, value: int) -> None:
        self._made.fill_(value)
        for rule in self.rules:
            rule.resume(value)

    def state(self) -> dict[str, Sequence[Tensor] | Sequence[Runs]]:
        """What a checkpoint holds of parameters: the owned values of every bucket by kind, at least fp32. A rule that
        takes some parameters alone has state of those alone (`Runs`)."""
        return {"weight": self.masters, **self._states}

    def tensors(self) -> dict[str, list[Tensor]]:
        """The state as it lies in memory, by kind."""
        return {
            kind: [part.tensor if isinstance(part, Runs) else part for part in parts]
            for kind, parts in self.state().items()
        }

    def grad_norm(self) -> Tensor:
        """Global L2 norm over all axes, [1] fp64 on the device; replicas and tied copies count once. Collective.

        Every rank takes part, so that a value that is not finite on any of them is known to all.
        """
        total = sum_of_squares(self._counted, self.buffers.context.device)
        mesh = self.buffers.mesh
        copies = 1 if self.buffers.zero else mesh.data.size  # without ZeRO-1 all of them hold the same sum
        return all_reduce(total, mesh.distinct).div_(copies).sqrt_()

    def step(self, lr: float) -> StepResult:
        """Update the parameters from the owned gradients, which are clipped in place. Collective."""
        return StepResult.of(float(self.start(lr)))

    def start(self, lr: float, *, leave_out: bool = False) -> Tensor:
        """The same without a wait for the device. Returns the gradient norm, [1] fp64.

        leave_out: change nothing, as if the norm were not finite; the same on all ranks.
        """
        norm = self.grad_norm()
        finite = torch.zeros_like(norm, dtype=torch.bool) if leave_out else norm.isfinite()
        if self.config.clip_grad and self.grads:
            least = self.config.clip_grad
            scale = torch.where(finite & (norm > least), least / (norm + 1e-6), 1.0)
            if scale.is_cuda or float(scale) < 1.0:  # on a CPU to ask is cheaper than to multiply by 1
                torch._foreach_mul_(self.grads, scale.to(self.buffers.context.wide_dtype).squeeze(0))
        for rule in self.rules:
            rule.update(lr, finite)
        self._made += finite.squeeze(0)
        self.publish()
        return norm

    def publish(self) -> None:
        """Bring the master weights into the parameters of all data-parallel ranks. Collective."""
        params = self.buffers.params
        if self.buffers.zero:
            narrow = [masters.to(own.dtype) for masters, own in zip(self.masters, params, strict=True)]
            self.buffers.gather(narrow, into=params)
            return
        for own, masters in zip(params, self.masters, strict=True):
            if masters.data_ptr() != own.data_ptr():
                own.copy_(masters)


def is_matrix(held: Held) -> bool:
    """Whether an optimizer that takes matrices alone takes it."""
    return held.parameter.is_layer_matrix


def kinds_of(config: OptimConfig) -> list[OptimizerKind]:
    """The rule that `optim.name` names, and the one that all else goes by."""
    kind = optimizer_kind(config.name)
    return [kind] if kind.others is None else [kind, optimizer_kind(kind.others)]


def works_on_matrices(config: OptimConfig) -> bool:
    """Whether its matrices are updated as a whole, wherever their parts are."""
    return optimizer_kind(config.name).others is not None


def runs_with_state(buffers: StageBuffers, config: OptimConfig, kind: OptimizerKind) -> list[tuple[int, slice]] | None:
    """(bucket, run in its owned part) of what a rule keeps state of; None: of everything."""
    if not works_on_matrices(config):
        return None
    return buffers.owned_runs(lambda held: Treatment.of(held, config).rule).get(kind.name, [])


def state_elements(buffers: StageBuffers, config: OptimConfig) -> int:
    """Elements of the state beside the weights that an optimizer keeps of what a rank owns, with padding."""
    owned = buffers.take_owned(buffers.params)
    return sum(len(kind.state) * size_of(owned, runs_with_state(buffers, config, kind)) for kind in kinds_of(config))


def _no_matrices(function: Callable[[Tensor], Tensor]) -> None:
    raise AssertionError("a rule that sees whole matrices names the one for all else: OptimizerKind.others")
