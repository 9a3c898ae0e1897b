"""Tensor-parallel layers. Activations are flattened tokens.

Shape letters: T tokens (batch-major: sample b, position s is token b*S + s), H hidden, F features of a layer, V vocab,
R tensor-parallel ranks. Under sequence parallelism the tokens outside the column-row pairs are split: T/R per rank.
Source: Shoeybi et al. 2019, section 3; Korthikanti et al. 2022, section 4.2.
"""

import torch
from torch import Tensor, nn

from megapar.kernels.layernorm import layernorm, layernorm_input_grad, layernorm_weight_grad
from megapar.kernels.rmsnorm import rmsnorm, rmsnorm_input_grad, rmsnorm_weight_grad
from megapar.parallel.collectives import reduce_from_region, reduce_scatter_tokens
from megapar.parallel.context import StageContext
from megapar.parallel.overlap import all_gather_matmul, copy_matmul, matmul_all_reduce, matmul_reduce_scatter
from megapar.parallel.record import Constant, Init, ParameterRecord, Split
from megapar.parallel.weight_grad import AddBias, LocalParameter, Lookup, owned_op


class ColumnParallelLinear(nn.Module):
    """y = x @ W.T + b, W split over its output features.

    x [T, in] (sequence parallel: [T/R, in]) -> y [T, out/R]. Several logical weights that read the same input (q, k
    and v; gate and up) are stacked and multiplied at once: `outputs` is a list of (name, features, blocks) where
    blocks is the number of heads that can't be cut, or None. `sizes` holds this rank's features of each.
    Collectives: forward none (sequence parallel: all-gather), backward all-reduce (reduce-scatter).
    """

    def __init__(
        self,
        context: StageContext,
        in_features: int,
        outputs: list[tuple[str, int, int | None]],
        *,
        init: Init,
        bias: bool,
        tie: str | None = None,
    ) -> None:
        super().__init__()
        self.context = context
        weights = [
            ParameterRecord(f"{name}.weight", (features, in_features), init, (Split("tp", 0, blocks),), tie)
            for name, features, blocks in outputs
        ]
        self.owner = context.parameter(self, "weight", *weights)
        self.sizes = [piece.stop - piece.start for piece in self.owner.pieces]
        self.overlap = context.overlap(self.owner)
        self.bias_owner: LocalParameter | None = None
        if bias:
            biases = [
                ParameterRecord(f"{name}.bias", (features,), Constant(0.0), (Split("tp", 0, blocks),))
                for name, features, blocks in outputs
            ]
            self.bias_owner = context.parameter(self, "bias", *biases)

    def forward(self, x: Tensor) -> Tensor:
        multiply = all_gather_matmul if self.context.splits_tokens else copy_matmul
        y = multiply(x, self.owner.tensor, self.overlap)
        return owned_op(AddBias, y, self.bias_owner, self.context.weight_grads) if self.bias_owner else y


class RowParallelLinear(nn.Module):
    """y = x @ W.T + b, W split over its input features.

    x [T, in/R] -> y [T, out] (sequence parallel: [T/R, out]). The bias is added once, after the sum.
    Collectives: forward all-reduce (sequence parallel: reduce-scatter), backward none (all-gather).
    """

    def __init__(
        self,
        context: StageContext,
        name: str,
        in_features: int,
        out_features: int,
        *,
        init: Init,
        bias: bool,
        blocks: int | None = None,
    ) -> None:
        super().__init__()
        self.context = context
        split = Split("tp", 1, blocks)
        record = ParameterRecord(f"{name}.weight", (out_features, in_features), init, (split,))
        self.owner = context.parameter(self, "weight", record)
        self.overlap = context.overlap(self.owner)
        self.bias_owner: LocalParameter | None = None
        if bias:
            record = ParameterRecord(f"{name}.bias", (out_features,), Constant(0.0))
            self.bias_owner = context.parameter(self, "bias", record)

    def forward(self, x: Tensor) -> Tensor:
        multiply = matmul_reduce_scatter if self.context.splits_tokens else matmul_all_reduce
        y = multiply(x, self.owner.tensor, self.overlap)
        return owned_op(AddBias, y, self.bias_owner, self.context.weight_grads) if self.bias_owner else y


class VocabParallelEmbedding(nn.Module):
    """Rows of a table split over the vocabulary: ids [T] -> [T, H] (sequence parallel: [T/R, H]).

    A rank contributes zeros for ids it does not hold. The vocabulary need not be divisible: shards differ by one row.
    Collectives: forward all-reduce (sequence parallel: reduce-scatter), backward none (all-gather).
    """

    def __init__(
        self, context: StageContext, name: str, vocab_size: int, hidden: int, *, init: Init, tie: str | None = None
    ) -> None:
        super().__init__()
        self.context = context
        record = ParameterRecord(f"{name}.weight", (vocab_size, hidden), init, (Split("tp", 0),), tie)
        self.owner = context.parameter(self, "weight", record)
        self.first = self.owner.pieces[0].shard.box[0].start

    def forward(self, ids: Tensor) -> Tensor:
        x = owned_op(Lookup, ids - self.first, self.owner, self.context.weight_grads)
        tp = self.context.tp
        return reduce_scatter_tokens(x, tp) if self.context.splits_tokens else reduce_from_region(x, tp)


class PositionEmbedding(nn.Module):
    """A learned table, the whole on every rank: positions [t] of this rank's tokens -> [t, H]."""

    def __init__(self, context: StageContext, name: str, positions: int, hidden: int, *, init: Init) -> None:
        super().__init__()
        self.context = context
        self.owner = context.parameter(self, "weight", ParameterRecord(f"{name}.weight", (positions, hidden), init))

    def forward(self, positions: Tensor) -> Tensor:
        return owned_op(Lookup, positions, self.owner, self.context.weight_grads)


class Norm(nn.Module):
    """RMSNorm, or LayerNorm with a bias: x [t, H] -> [t, H], statistics in at least fp32.

    The weight is the same on every rank. Source: Zhang & Sennrich 2019; Ba et al. 2016.
    """

    def __init__(self, context: StageContext, name: str, hidden: int, *, kind: str, eps: float) -> None:
        super().__init__()
        self.context, self.eps = context, eps
        self.owner = context.parameter(self, "weight", ParameterRecord(f"{name}.weight", (hidden,), Constant(1.0)))
        self.bias_owner: LocalParameter | None = None
        if kind == "layernorm":
            self.bias_owner = context.parameter(self, "bias", ParameterRecord(f"{name}.bias", (hidden,), Constant(0.0)))

    def forward(self, x: Tensor) -> Tensor:
        return self._apply_to(x, None)[0]

    def of_sum(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of x + residual, x + residual), [t, H] each, in one pass."""
        y, h = self._apply_to(x, residual)
        return y, h

    def _apply_to(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, ...]:
        weight_grads = self.context.weight_grads
        if self.bias_owner is None:
            return _OwnedRMSNorm.apply(x, residual, self.owner.tensor, self.owner, self.eps, weight_grads)
        tensors, owners = (self.owner.tensor, self.bias_owner.tensor), (self.owner, self.bias_owner)
        return _OwnedLayerNorm.apply(x, residual, *tensors, *owners, self.eps, weight_grads)


class _OwnedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, owner, eps, weight_grads):
        y, h, rstd = rmsnorm(x, weight, eps, residual)
        ctx.save_for_backward(h, weight, rstd)
        ctx.owner, ctx.weight_grads = owner, weight_grads
        return (y,) if residual is None else (y, h)

    @staticmethod
    def backward(ctx, dy, dh=None):
        h, weight, rstd = ctx.saved_tensors
        dx = rmsnorm_input_grad(dy, h, weight, rstd, dh) if any(ctx.needs_input_grad[:2]) else None
        ctx.weight_grads.submit_vectors(lambda: [rmsnorm_weight_grad(dy, h, rstd)], ctx.owner)
        return dx, dx if ctx.needs_input_grad[1] else None, *(None,) * 4


class _OwnedLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, owner, bias_owner, eps, weight_grads):
        y, h, mean, rstd = layernorm(x, weight, bias, eps, residual)
        ctx.save_for_backward(h, weight, mean, rstd)
        ctx.owners, ctx.weight_grads = (owner, bias_owner), weight_grads
        return (y,) if residual is None else (y, h)

    @staticmethod
    def backward(ctx, dy, dh=None):
        h, weight, mean, rstd = ctx.saved_tensors
        dx = layernorm_input_grad(dy, h, weight, mean, rstd, dh) if any(ctx.needs_input_grad[:2]) else None
        ctx.weight_grads.submit_vectors(lambda: layernorm_weight_grad(dy, h, mean, rstd), *ctx.owners)
        return dx, dx if ctx.needs_input_grad[1] else None, *(None,) * 6
