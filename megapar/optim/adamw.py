"""AdamW over a stage's flat buffers, whole or ZeRO-1-sharded, with clipping by the global norm."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

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


def sum_of_squares(runs: Sequence[Tensor], device: torch.device) -> Tensor:
    """[1] fp64: of all elements, accumulated in fp64.

    In fp32 a sum's error grows with its length: `torch._foreach_norm` was 1e-5 off at a million elements. On a CPU a
    piece at a time is widened into one buffer: 6 ms for 10 million elements, where torch's own fp64 norm takes 44.
    """
    total = torch.zeros(1, dtype=torch.float64, device=device)
    if device.type != "cpu":
        return (
            total + torch.stack(torch._foreach_norm(list(runs), dtype=torch.float64)).square().sum() if runs else total
        )
    buffer = torch.empty(min(_PIECE, max(map(len, runs), default=0)), dtype=torch.float64)
    for piece in (piece for run in runs for piece in run.split(_PIECE)):
        wide = buffer[: len(piece)].copy_(piece)
        total += torch.dot(wide, wide)
    return total


_PIECE = 1 << 16  # elements, half a MB: in the cache between its two uses


class Optimizer:
    """torch's fused AdamW on the runs of the flat buffers that this rank owns.

    grads: the flat gradients this rank owns, the same memory every step. Master weights are at least fp32; where the
    compute dtype is that wide and nothing is sharded they are the parameters themselves, else a copy of the owned part.
    exp_avg, exp_avg_sq: flat moments beside the masters. Weight decay applies by the parameter record.
    """

    def __init__(self, buffers: StageBuffers, grads: Tensor, config: OptimConfig) -> None:
        self.buffers, self.grads, self.config = buffers, grads, config
        self.masters = buffers.take_owned(buffers.params).to(buffers.context.wide_dtype)
        self.exp_avg = torch.zeros_like(self.masters)
        self.exp_avg_sq = torch.zeros_like(self.masters)
        groups = [
            {"params": [self._parameter(run) for run in runs], "weight_decay": config.weight_decay if decays else 0.0}
            for decays, runs in buffers.owned_runs(lambda parameter, piece: piece.record.decays).items()
        ]
        betas = (config.beta1, config.beta2)
        self.adamw = torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)
        for group in self.adamw.param_groups:
            for parameter in group["params"]:
                self._attach_state(parameter)
        counted = buffers.owned_runs(buffers.counted).get(True, [])
        self._counted = [grads[run] for run in counted]

    def _parameter(self, run: slice) -> Tensor:
        parameter = self.masters[run]
        parameter.grad = self.grads[run]
        return parameter

    def _attach_state(self, parameter: Tensor) -> None:
        """Let AdamW keep its moments in the flat buffers, at the parameter's place."""
        run = slice(parameter.storage_offset() - self.masters.storage_offset(), None)
        size = parameter.numel()
        self.adamw.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": self.exp_avg[run][:size],
            "exp_avg_sq": self.exp_avg_sq[run][:size],
        }

    @property
    def steps(self) -> int:
        """Updates made so far (skipped steps make none)."""
        return next((int(state["step"]) for state in self.adamw.state.values()), 0)

    @steps.setter
    def steps(self, value: int) -> None:
        for state in self.adamw.state.values():
            state["step"].fill_(value)

    def flat_state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of every parameter: flat tensors of the owned values by kind, at least fp32."""
        return {"weight": self.masters, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    def grad_norm(self) -> float:
        """Global L2 norm over all axes; replicas and tied copies count once. Collective.

        Every rank takes part, so that a value that is not finite on any of them is known to all.
        """
        total = sum_of_squares(self._counted, self.grads.device)
        mesh = self.buffers.mesh
        copies = 1 if self.buffers.zero else mesh.data.size  # without ZeRO-1 all of them hold the same sum
        return math.sqrt(all_reduce(total, mesh.distinct).item() / copies)

    def step(self, lr: float) -> StepResult:
        """Update the parameters from the owned gradients, which are clipped in place. Collective."""
        norm = self.grad_norm()
        if not math.isfinite(norm):
            return StepResult(norm, skipped=True)
        if self.config.clip_grad and norm > self.config.clip_grad:
            self.grads.mul_(self.config.clip_grad / (norm + 1e-6))
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self.publish()
        return StepResult(norm, skipped=False)

    def publish(self) -> None:
        """Bring the master weights into the parameters of all data-parallel ranks. Collective."""
        buffers = self.buffers
        if buffers.zero:
            buffers.params.copy_(buffers.gather(self.masters.to(buffers.params.dtype)))
        elif self.masters.data_ptr() != buffers.params.data_ptr():
            buffers.params.copy_(self.masters)
