"""Vocab-parallel cross entropy: one collective, and no rank ever holds the logits of the whole vocabulary."""

import torch
from torch import Tensor

from megapar.mesh import Axis
from megapar.parallel.collectives import all_gather


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, first: int, axis: Axis) -> Tensor:
        inside = (targets >= first) & (targets < first + logits.shape[1])
        local = (targets - first).where(inside, 0)
        maximum = logits.amax(1)
        total = torch.exp(logits - maximum.unsqueeze(1)).sum(1)
        target = logits.gather(1, local.unsqueeze(1)).squeeze(1).where(inside, 0.0)
        # [R, T, 3] in rank order, merged the same way on every rank.
        parts = all_gather(torch.stack([maximum, total, target], 1).unsqueeze(0), axis)
        maxima, totals, targets_logit = parts.unbind(2)
        highest = maxima.amax(0)
        log_sum = highest + torch.log((totals * torch.exp(maxima - highest)).sum(0))
        ctx.save_for_backward(logits, log_sum, local, inside)
        return log_sum - targets_logit.sum(0)

    @staticmethod
    def backward(ctx, grad: Tensor):
        logits, log_sum, local, inside = ctx.saved_tensors
        grad_logits = torch.exp(logits - log_sum.unsqueeze(1))
        grad_logits.scatter_add_(1, local.unsqueeze(1), -inside.to(logits.dtype).unsqueeze(1))
        return grad_logits.mul_(grad.unsqueeze(1)), None, None, None


def vocab_parallel_cross_entropy(logits: Tensor, targets: Tensor, first: int, axis: Axis) -> Tensor:
    """Negative log likelihood of every token, in nats.

    logits [T, V_r]: this rank's part of the vocabulary, at least fp32; it starts at row `first`. targets [T]: ids in
    the whole vocabulary. Returns [T], equal on all ranks of the axis. Forward: one all-gather of [T, 3] (maximum, sum
    of exponentials, target logit). Backward: local, the softmax minus the one-hot target.
    """
    return _VocabParallelCrossEntropy.apply(logits, targets, first, axis)
