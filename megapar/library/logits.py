"""Logits of the whole vocabulary from those of tensor-parallel ranks, and the loss that does without them."""

from collections.abc import Callable

import torch
from torch import Tensor

from megapar.library.batch import IGNORED
from megapar.mesh import Axis
from megapar.parallel.collectives import all_gather
from megapar.parallel.cross_entropy import vocab_parallel_cross_entropy
from megapar.parallel.record import Split
from megapar.pipeline.stage import Batch, Tensors

LossFn = Callable[[Tensor, Tensor], Tensor]


def gather_logits(logits: Tensor, vocabulary: int, axis: Axis) -> Tensor:
    """[T, V_r] of this rank -> [T, V], the same on every rank of the axis. Dual: this rank's columns of the gradient.

    What follows must be the same on every rank, too. Collective: one all-gather, padded to the widest part.
    """
    return _GatherLogits.apply(logits, vocabulary, axis) if axis.size > 1 else logits


class _GatherLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, vocabulary: int, axis: Axis) -> Tensor:
        parts = [Split("tp", 0).part(vocabulary, axis.size, rank)[0] for rank in range(axis.size)]
        ctx.columns = parts[axis.index]
        widths = [part.stop - part.start for part in parts]
        padded = logits.new_zeros(1, len(logits), max(widths))
        padded[0, :, : logits.shape[1]] = logits
        gathered = all_gather(padded, axis)
        return torch.cat([whole[:, :width] for whole, width in zip(gathered, widths, strict=True)], 1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad[:, ctx.columns].contiguous(), None, None


def cross_entropy(first_id: int, axis: Axis) -> Callable[[Tensors, Batch], Tensor]:
    """A micro-batch's part of the mean loss over the global batch's labels, in nats per token, fp64."""

    def loss(outputs: Tensors, batch: Batch) -> Tensor:
        labels = batch["labels"].reshape(-1)
        losses = vocab_parallel_cross_entropy(outputs["logits"], labels, first_id, axis, ignored=IGNORED)
        return losses.sum(dtype=torch.float64) / batch["tokens"]

    return loss


def own_loss(loss_fn: LossFn, parts: int, vocabulary: int, axis: Axis) -> Callable[[Tensors, Batch], Tensor]:
    """The same from a function (logits [b, S, V], labels [b, S]) -> mean of a micro-batch; there are `parts`."""

    def loss(outputs: Tensors, batch: Batch) -> Tensor:
        labels = batch["labels"]
        logits = gather_logits(outputs["logits"], vocabulary, axis)
        return loss_fn(logits.view(*labels.shape, vocabulary), labels) / parts

    return loss
