"""The gradients of recorded calls against finite differences and autograd."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megapar.config.check import with_layout
from megapar.config.keys import changed
from megapar.config.layout import Layout
from megapar.config.schema import TrainConfig
from megapar.kernels import requested_backend, use_backend
from megapar.operations.calls import SEED, Call, record
from megapar.parallel.record import Normal
from megapar.parallel.weight_grad import LocalParameter, Piece
from megapar.part import BuildStage, ModelPart
from megapar.tasks import task_kind

# Central differences along a direction of the tensor's own size (times STEP) are off by STEP^2 / 6 times the ratio of
# third and first derivatives, and by rounding, EPS / STEP: 1e-10 and 2e-11. BOUND leaves four digits for ratios of
# derivatives, as in a softmax. Right ones reach 1e-8 alone, and 2e-7 as a whole model; a mistake is a factor or a term.
STEP, BOUND = 1e-5, 1e-6
EPS = 2.0**-52
# Autograd of the same forward does the same sums in another order.
AUTOGRAD_BOUND = 1e-10
# A gradient is wrong that is off with all of them: a smaller one is nearer where derivatives are large, and a kink (of
# a ReLU) between the two ends of one difference is in the way of that one alone.
STEPS = (STEP, STEP / 8, STEP / 64)
DIRECTIONS = 2
POSITIONS, SAMPLES = 8, 2  # of the batch, at most

_MODES = ("at once", "at once, added to an earlier one", "deferred", "deferred, added to an earlier one")


@dataclass(frozen=True)
class Wrong:
    """A gradient that is not the forward's. where: module's path; what: the operation; of: input or parameter;
    error: relative; against, modes: what it was compared with, and when it is off, none for always."""

    where: str
    what: str
    of: str
    error: float
    against: str
    modes: tuple[str, ...]

    def __str__(self) -> str:
        when = f", {' and '.join(self.modes)}" if self.modes else ""
        return (
            f"{_place(self.where, self.what)}: the gradient of {self.of} is off by {self.error:.1e} of its size "
            f"({self.against}{when}); look at its backward"
        )


@dataclass
class Report:
    """checked: calls; not_alone: those that can't be repeated outside of their model, and are checked within what is
    around them; gradients: inputs and weights; error: the largest relative one of the right ones."""

    checked: int = 0
    not_alone: list[str] = field(default_factory=list)
    gradients: int = 0
    error: float = 0.0
    wrong: list[Wrong] = field(default_factory=list)


def _place(where: str, what: str) -> str:
    return f"{where} ({what})" if where else what


def check_operations(config: TrainConfig, build_stage: BuildStage | None = None) -> Report:
    """Check every operation that the config's model uses, in this process and on its CPU, in fp64 and torch's form of
    the kernels.

    config: resolved, with its data prepared; build_stage: as of `ModelPart`.
    """
    one = with_layout(config, Layout())
    windows = config.data.source == "tokens"  # other samples may not fit into fewer positions
    batch = {
        "train.seq_length": min(config.train.seq_length, POSITIONS) if windows else config.train.seq_length,
        "train.micro_batch_size": SAMPLES,
        "train.global_batch_size": SAMPLES,
        "train.eval_every": 0,
    }
    where = {"train.dtype": "fp64", "train.device": "cpu", "kernels.backend": "torch"}
    one = changed(one, batch | where)
    with _process_kept():
        part = ModelPart(one, 0, build_stage, thawed=True)
        try:
            return _Checker(part, one).report()
        finally:
            part.close()


class _Checker:
    def __init__(self, part: ModelPart, config: TrainConfig) -> None:
        self.context, self.parameters = part.context, part.context.parameters
        self.weight_grads = part.context.weight_grads
        self.random = torch.Generator().manual_seed(SEED)
        self.result = Report()
        for parameter in self.parameters:
            for piece in parameter.pieces:
                self._move_off_initial(parameter, piece)
        [stage] = part.stages.values()
        stage.train()
        task = task_kind(config.task.name).make(config, part.context, part.stages)
        self.whole = record(stage, task, self.parameters, config.parallel.sequence_parallel)

    def report(self) -> Report:
        whole = self.whole
        self._walk(whole.inner, {})
        if not self.result.wrong and (wrong := self._check(whole, whole.weights, together=True)):
            # Something that looked like a call that was right: now every single one, and the weights one by one.
            self._walk(whole.inner, None)
            if not self.result.wrong:
                self.result.wrong += self._check(whole, whole.weights) or wrong
        return self.result

    def _move_off_initial(self, parameter: LocalParameter, piece: Piece) -> None:
        """Random weights of a size at which nonlinearities matter; norms' not 1, biases not 0."""
        rows = values_of(parameter)[piece.start : piece.stop]
        noise = torch.rand(rows.shape, generator=self.random, dtype=rows.dtype) - 0.5
        if isinstance(piece.record.init, Normal):
            rows.normal_(0.0, piece.record.shape[-1] ** -0.5, generator=self.random)
        else:
            rows.copy_(torch.where(rows == 0, noise, rows * (1 + noise)))

    def _walk(self, calls: Sequence[Call], seen: dict[Any, bool] | None) -> bool:
        """Check these and what is inside of them; whether all are right. seen: of what calls looked like that need not
        be checked again, whether those were right; None: check every one."""
        right = True
        for call in calls:
            if not self._walk(call.inner, seen):
                right = False
            elif seen is not None and call.signature in seen:
                right = right and seen[call.signature]
            else:
                of_inner = {id(weight) for inner in call.inner for weight in inner.weights}
                wrong = self._check(call, [weight for weight in call.weights if id(weight) not in of_inner])
                self.result.wrong += wrong
                right = right and not wrong
                if seen is not None:
                    seen[call.signature] = not wrong
        return right

    # ---------------------------------------------------------------------------------------------------- the gradients
    def _check(self, call: Call, weights: Sequence[LocalParameter], together: bool = False) -> list[Wrong]:
        """Gradients of a call's inputs and of these weights. together: the weights along one direction."""
        groups = self._groups(call, weights, together)
        if not groups:
            return []
        try:
            gradients, cotangents = self._gradients(call)
        except Exception:  # whatever a call that can't be repeated alone may raise: what is around it is checked
            if call is self.whole:
                raise
            self.result.not_alone.append(_place(call.where, call.what))
            return []
        if not cotangents:
            return []
        self.result.checked += 1
        plain = self._autograd(call, cotangents)
        found = []
        for of, members in groups:
            self.result.gradients += 1
            errors = self._errors(call, members, gradients, cotangents)
            off = [mode for mode, error in errors.items() if not error <= BOUND]
            if off:
                when = () if len(off) == len(_MODES) else tuple(off)
                worst = max((errors[mode] for mode in off), key=lambda error: math.inf if math.isnan(error) else error)
                found.append(Wrong(call.where, call.what, of, worst, "finite differences", when))
                continue
            self.result.error = max(self.result.error, *errors.values())
            if plain is not None and self._agrees(call, members, plain, cotangents):
                against = {mode: _difference(members, own, plain) for mode, own in gradients.items()}
                off = [mode for mode, error in against.items() if not error <= AUTOGRAD_BOUND]
                if off:
                    when = () if len(off) == len(_MODES) else tuple(off)
                    worst = max(against[mode] for mode in off)
                    found.append(Wrong(call.where, call.what, of, worst, "autograd", when))
        return found

    def _groups(
        self, call: Call, weights: Sequence[LocalParameter], together: bool
    ) -> list[tuple[str, list["_Member"]]]:
        """What is varied along one direction, by name: each input, and each logical parameter or all of them."""
        inputs = [at for at in call.inputs if call.arguments[at].numel()]
        groups = []
        for number, at in enumerate(inputs, start=1):
            of = "its input" if len(inputs) == 1 else f"its input {number}"
            groups.append((of, [_Member(at, None, call.arguments[at])]))
        pieces = []
        for weight in weights:
            for piece in weight.pieces:
                member = _Member(-1, (weight, piece), values_of(weight)[piece.start : piece.stop])
                pieces.append((piece.record.name, [member]))
        if together and pieces:
            return [*groups, ("its weights", [member for _, members in pieces for member in members])]
        return groups + pieces

    def _gradients(self, call: Call) -> tuple[dict[str, dict[Any, Tensor]], dict[int, Tensor]]:
        """By mode the gradients by input and by weight; and what the outputs were multiplied with, by output."""
        found: dict[str, dict[Any, Tensor]] = {}
        cotangents: dict[int, Tensor] = {}
        for deferred in (False, True):
            self.weight_grads.begin(self.parameters)
            before: dict[Any, Tensor] = {}
            for mode in _MODES[2 * deferred : 2 * deferred + 2]:
                leaves = {at: call.arguments[at].clone().requires_grad_() for at in call.inputs}
                outputs = call.make(leaves)
                if not cotangents:
                    cotangents = self._cotangents(outputs)
                    if not cotangents:
                        return {}, {}
                self.weight_grads.defer((0, 0) if deferred else None)
                try:
                    _times(outputs, cotangents).backward()
                finally:
                    self.weight_grads.defer(None)
                self.weight_grads.run(0, 0)
                self.weight_grads.clear_unused(call.weights)
                after = {weight: weight.grad.clone() for weight in call.weights}
                gradients: dict[Any, Tensor] = {
                    at: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for at, leaf in leaves.items()
                }
                gradients |= {weight: total - before[weight] if before else total for weight, total in after.items()}
                found[mode], before = gradients, after
        return found, cotangents

    def _cotangents(self, outputs: Sequence[Tensor]) -> dict[int, Tensor]:
        """A random gradient of every output that has one."""
        return {at: self._like(out) for at, out in enumerate(outputs) if out.requires_grad}

    def _like(self, tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=self.random, dtype=tensor.dtype)

    def _errors(
        self,
        call: Call,
        members: Sequence["_Member"],
        gradients: dict[str, dict[Any, Tensor]],
        cotangents: dict[int, Tensor],
        trust: bool = True,
    ) -> dict[str, float]:
        """By mode the relative error of the gradient along random directions: the largest of DIRECTIONS, of which each
        is tried with smaller steps while it is off.

        trust: a forward that computes in fp32 inside has differences that are no more exact than those of two steps
        are alike; twice that much is no error
        """
        errors = dict.fromkeys(gradients, 0.0)
        for _ in range(DIRECTIONS):
            directions = [self._like(member.values) * _size(member.values) for member in members]
            here = dict.fromkeys(gradients, math.inf)
            before: tuple[float, float] | None = None
            for step in STEPS:
                slope, rounding = self._slope(call, members, directions, cotangents, step)
                tries = [(slope, rounding)]
                if trust and before is not None:
                    tries.append((before[0], before[1] + 2 * abs(slope - before[0])))
                before = slope, rounding
                for mode, own in gradients.items():
                    off = [_off(members, directions, own, *one) for one in tries]
                    here[mode] = math.nan if any(map(math.isnan, off)) else min(here[mode], *off)
                if all(error <= BOUND for error in here.values()):
                    break
            errors = {mode: here[mode] if not here[mode] <= errors[mode] else errors[mode] for mode in errors}
        return errors

    def _agrees(self, call: Call, members: Sequence["_Member"], plain: dict[Any, Tensor], cotangents: Any) -> bool:
        """Whether autograd's gradient of the forward is that of finite differences: the forward may hide from it, or
        compute in fp32."""
        return self._errors(call, members, {"": plain}, cotangents, trust=False)[""] <= BOUND

    @torch.no_grad()
    def _slope(
        self,
        call: Call,
        members: Sequence["_Member"],
        directions: Sequence[Tensor],
        cotangents: dict[int, Tensor],
        step: float,
    ) -> tuple[float, float]:
        """The derivative of <outputs, cotangents> along the directions, and what of it may be rounding."""
        ends = []
        for sign in (1, -1):
            values, kept = {}, []
            for member, direction in zip(members, directions, strict=True):
                if member.weight is None:
                    values[member.at] = member.values + sign * step * direction
                else:
                    kept.append((member.values, member.values.clone()))
                    member.values.add_(direction, alpha=sign * step)
            outputs = call.make(values)
            ends.append([outputs[at].clone() for at in cotangents])
            for place, before in kept:
                place.copy_(before)
        slope = square = 0.0
        for high, low, cotangent in zip(*ends, cotangents.values(), strict=True):
            slope += float(((high - low) * cotangent).sum()) / (2 * step)
            square += float((high * cotangent).square().sum())
        return slope, 16 * EPS * math.sqrt(square) / step

    def _autograd(self, call: Call, cotangents: dict[int, Tensor]) -> dict[Any, Tensor] | None:
        """Torch's own gradients of an operation's forward, None where it can't differentiate that."""
        if call.plain is None:
            return None
        leaves = {at: call.arguments[at].clone().requires_grad_() for at in call.inputs}
        try:
            outputs = call.make(leaves, call.plain)
            sources = [*leaves.values(), *(weight.tensor for weight in call.weights)]
            grads = torch.autograd.grad(_times(outputs, cotangents), sources, allow_unused=True)
        except Exception:  # what a forward that was not written for it may raise
            return None
        names = [*leaves, *call.weights]
        return {
            name: torch.zeros_like(source) if grad is None else grad.view(_shape(name, grad))
            for name, source, grad in zip(names, sources, grads, strict=True)
        }


@dataclass(frozen=True)
class _Member:
    """An input (its place among the arguments), or a piece of a weight; values: its own, a view of a weight's."""

    at: int
    weight: tuple[LocalParameter, Piece] | None
    values: Tensor

    def of(self, gradients: dict[Any, Tensor]) -> Tensor:
        if self.weight is None:
            return gradients[self.at]
        parameter, piece = self.weight
        return gradients[parameter].view(parameter.shape)[piece.start : piece.stop]


def _off(
    members: Sequence[_Member],
    directions: Sequence[Tensor],
    gradients: dict[Any, Tensor],
    slope: float,
    rounding: float,
) -> float:
    """How far the gradient's slope is from this one, relative to the gradient and beyond rounding."""
    own = size = 0.0
    for member, direction in zip(members, directions, strict=True):
        gradient = member.of(gradients)
        own += float((gradient * direction).sum())
        size += float(gradient.square().sum()) * _size(member.values) ** 2
    error = abs(own - slope) - rounding
    if error <= 0:
        return 0.0
    return error / max(math.sqrt(size), abs(slope))


def _times(outputs: Sequence[Tensor], cotangents: dict[int, Tensor]) -> Tensor:
    """The scalar <outputs, cotangents>. Given gradients of the outputs, autograd would import sympy first."""
    products = [(outputs[at] * cotangent).sum() for at, cotangent in cotangents.items()]
    return torch.stack(products).sum()


def _difference(members: Sequence[_Member], own: dict[Any, Tensor], plain: dict[Any, Tensor]) -> float:
    """The largest difference of two gradients, relative to the largest element."""
    most = max(float(member.of(plain).abs().max()) for member in members)
    error = max(float((member.of(own) - member.of(plain)).abs().max()) for member in members)
    return error / most if most > AUTOGRAD_BOUND else error


def _size(values: Tensor) -> float:
    """The root mean square, 1 of zeros."""
    return float(values.square().mean().sqrt()) or 1.0


def values_of(parameter: LocalParameter) -> Tensor:
    """The memory of a parameter, in the shape of its pieces."""
    return parameter.tensor.detach().view(parameter.shape)


def _shape(name: Any, grad: Tensor) -> Any:
    return name.shape if isinstance(name, LocalParameter) else grad.shape


@contextmanager
def _process_kept() -> Iterator[None]:
    """Afterwards this process's kernels, threads and random numbers are what they were before. One thread meanwhile:
    the tensors are small."""
    backend, threads, state = requested_backend(), torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        use_backend(backend)
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
