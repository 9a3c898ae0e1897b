"""Vocab-parallel cross entropy: one collective, and no rank ever holds the logits of the whole vocabulary."""

from typing import Any

import torch
from torch import Tensor

from megapar.kernels.cross_entropy import (
    PLAIN,
    Objective,
    cross_entropy_gradient_,
    cross_entropy_statistics,
    merge_statistics,
)
from megapar.mesh import Axis
from megapar.parallel.collectives import all_gather


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, first: int, axis: Axis, ignored: int | None, objective: Objective
    ) -> Tensor:
        statistics = cross_entropy_statistics(logits, targets, first, total=objective.smoothing > 0)
        merged = merge_statistics(all_gather(statistics.unsqueeze(0), axis))
        counts = targets != ignored if ignored is not None else None
        ctx.save_for_backward(logits, targets, merged.log_sum, counts)
        ctx.first, ctx.objective = first, objective
        losses = merged.losses(objective)
        return losses if counts is None else losses.where(counts, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, log_sum, counts = ctx.saved_tensors
        grad = grad if counts is None else grad.where(counts, 0.0)
        return cross_entropy_gradient_(logits, targets, ctx.first, log_sum, grad, ctx.objective), *(None,) * 5


def vocab_parallel_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    first: int,
    axis: Axis,
    *,
    ignored: int | None = None,
    objective: Objective = PLAIN,
) -> Tensor:
    """Negative log likelihood of every token, in nats; with `objective` smoothed, and with a z-loss.

    logits [T, V_r] in any floating dtype: this rank's part of the vocabulary, which starts at row `first`. targets [T]:
    ids in the whole vocabulary; where it is `ignored` the loss and its gradient are 0. Returns [T] in fp32 or wider,
    equal on all ranks of the axis.

    Forward: one all-gather of [T, 3] (largest logit, sum of exponentials, target's logit; with smoothing their sum
    too). Backward: local, and it overwrites the logits: who needs them afterwards keeps a copy, and a second backward
    raises RuntimeError.
    """
    return _VocabParallelCrossEntropy.apply(logits, targets, first, axis, ignored, objective)


@torch.no_grad()
def vocab_parallel_argmax(logits: Tensor, first: int, axis: Axis) -> Tensor:
    """Id of every token's largest logit, the smallest of equal ones: [T, V_r] -> int64 [T], equal on all ranks.

    first: as above. One all-gather of [T, 2], fp64.
    """
    values, ids = logits.max(1)
    best = torch.stack([values.double(), (ids + first).double()], 1)
    found = all_gather(best.unsqueeze(0), axis)
    return found[..., 1].gather(0, found[..., 0].argmax(0, keepdim=True)).squeeze(0).long()
