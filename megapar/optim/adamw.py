"""AdamW over a rank's buckets, whole or ZeRO-1-sharded, with clipping by the global norm."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megapar.config.schema import OptimConfig
from megapar.parallel.buffers import StageBuffers
from megapar.parallel.collectives import all_reduce


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Learning rate of step 1..steps: linear warm-up, then a cosine from lr down to min_lr * lr at the last step."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    floor = config.lr * config.min_lr
    return floor + (config.lr - floor) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


@dataclass(frozen=True)
class StepResult:
    """grad_norm: before clipping. skipped: it was not finite, and no rank changed anything."""

    grad_norm: float
    skipped: bool

    @classmethod
    def of(cls, grad_norm: float) -> "StepResult":
        return cls(grad_norm, not math.isfinite(grad_norm))


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


class Optimizer:
    """torch's fused AdamW on what this rank owns of every bucket.

    grads: the owned gradients by bucket, the same memory every step. Master weights are at least fp32; where the
    compute dtype is that wide and nothing is sharded they are the parameters themselves, else a copy of the owned part.
    exp_avg, exp_avg_sq: moments beside the masters. Weight decay applies by the parameter record.
    """

    def __init__(self, buffers: StageBuffers, grads: Sequence[Tensor], config: OptimConfig) -> None:
        self.buffers, self.grads, self.config = buffers, list(grads), config
        wide = buffers.context.wide_dtype
        self.masters = [
            part.to(wide, copy=buffers.zero or part.dtype != wide) for part in buffers.take_owned(buffers.params)
        ]
        self.exp_avg = [torch.zeros_like(masters) for masters in self.masters]
        self.exp_avg_sq = [torch.zeros_like(masters) for masters in self.masters]
        groups: list[dict[str, Any]] = []
        states: dict[Tensor, dict[str, Tensor]] = {}
        for decays, runs in buffers.owned_runs(lambda held: held.piece.record.decays).items():
            parameters = []
            for bucket, run in runs:
                parameter = self.masters[bucket][run]
                parameter.grad = self.grads[bucket][run]
                states[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": self.exp_avg[bucket][run],
                    "exp_avg_sq": self.exp_avg_sq[bucket][run],
                }
                parameters.append(parameter)
            groups.append({"params": parameters, "weight_decay": config.weight_decay if decays else 0.0})
        betas = (config.beta1, config.beta2)
        self.adamw = torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)
        self.adamw.state.update(states)  # its moments are kept here, beside the masters
        counted = buffers.owned_runs(lambda held: held.counted).get(True, [])
        self._counted = [self.grads[bucket][run] for bucket, run in counted]

    @property
    def steps(self) -> int:
        """Updates made so far (skipped steps make none)."""
        return next((int(state["step"]) for state in self.adamw.state.values()), 0)

    @steps.setter
    def steps(self, value: int) -> None:
        for state in self.adamw.state.values():
            state["step"].fill_(value)

    def state(self) -> dict[str, list[Tensor]]:
        """What a checkpoint holds of every parameter: the owned values of every bucket by kind, at least fp32."""
        return {"weight": self.masters, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

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

    def start(self, lr: float) -> Tensor:
        """The same without a wait for the device. Returns the gradient norm, [1] fp64."""
        norm = self.grad_norm()
        finite = norm.isfinite()
        if self.config.clip_grad:
            least = self.config.clip_grad
            scale = torch.where(finite & (norm > least), least / (norm + 1e-6), 1.0)
            if scale.is_cuda or float(scale) < 1.0:  # on a CPU to ask is cheaper than to multiply by 1
                torch._foreach_mul_(self.grads, scale.to(self.buffers.context.wide_dtype).squeeze(0))
        for group in self.adamw.param_groups:
            group["lr"] = lr
        # The fused kernel leaves everything as it is where it is told that a gradient isn't finite.
        self.adamw.found_inf = finite.logical_not().float().squeeze(0)  # type: ignore[attr-defined]
        self.adamw.step()
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
