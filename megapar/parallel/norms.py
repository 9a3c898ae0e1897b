"""Norms: of the hidden width on every rank, of single heads, and of heads that tensor-parallel ranks divide."""

from typing import Literal

import torch
from torch import Tensor, nn

from megapar.kernels._common import wide_dtype
from megapar.kernels.layernorm import layernorm, layernorm_input_grad, layernorm_weight_grad
from megapar.kernels.rmsnorm import rmsnorm, rmsnorm_input_grad, rmsnorm_weight_grad
from megapar.parallel.collectives import all_reduce
from megapar.parallel.context import StageContext
from megapar.parallel.function import apply
from megapar.parallel.record import Constant, ParameterRecord, Split
from megapar.parallel.weight_grad import LocalParameter


class Norm(nn.Module):
    """RMSNorm, or LayerNorm with a bias: x [t, H] -> [t, H], statistics in at least fp32.

    The weight is the same on every rank. Source: Zhang & Sennrich 2019; Ba et al. 2016.
    offset: RMSNorm multiplies by 1 + weight (Gemma). sees: as of `ParameterRecord`; `heads` for rows that are heads
    """

    def __init__(
        self,
        context: StageContext,
        name: str,
        hidden: int,
        *,
        kind: str,
        eps: float,
        offset: bool = False,
        sees: Literal["local", "heads"] = "local",
    ) -> None:
        super().__init__()
        self.context, self.eps, self.offset = context, eps, offset
        record = ParameterRecord(f"{name}.weight", (hidden,), Constant(0.0 if offset else 1.0), sees=sees)
        self.owner = context.parameter(self, "weight", record)
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
            return apply(_OwnedRMSNorm, x, residual, self.owner.tensor, self.owner, self.eps, self.offset, weight_grads)
        tensors, owners = (self.owner.tensor, self.bias_owner.tensor), (self.owner, self.bias_owner)
        return apply(_OwnedLayerNorm, x, residual, *tensors, *owners, self.eps, weight_grads)


class HeadsNorm(nn.Module):
    """RMSNorm over all heads of a token together, which tensor-parallel ranks divide: x [T, F/R] -> [T, F/R].

    blocks: heads; where there are fewer than ranks, neighbours hold copies of one. Source: OLMo et al. 2024, "2 OLMo 2
    Furious", section 3. Collectives: an all-reduce of [T] in forward and in backward.
    """

    def __init__(self, context: StageContext, name: str, features: int, *, blocks: int, eps: float) -> None:
        super().__init__()
        self.context, self.features, self.eps = context, features, eps
        record = ParameterRecord(f"{name}.weight", (features,), Constant(1.0), (Split("tp", 0, blocks),))
        self.owner = context.parameter(self, "weight", record)
        self.copies = self.owner.pieces[0].shard.copies["tp"].count

    def forward(self, x: Tensor) -> Tensor:
        return apply(_OwnedHeadsNorm, x, self.owner.tensor, self)


class _OwnedHeadsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, norm):
        wide = x.to(wide_dtype(x))
        squares = all_reduce(wide.square().sum(1), norm.context.tp).div_(norm.copies * norm.features)
        rstd = torch.rsqrt(squares.add_(norm.eps))
        ctx.save_for_backward(x, weight, rstd)
        ctx.norm = norm
        return (wide * rstd.unsqueeze(1)).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        norm, wide = ctx.norm, x.to(rstd.dtype)
        dx = dy * weight.to(rstd.dtype)
        # Of copies of a head each has the gradient of its own queries, and takes its part of what all of them share.
        share = all_reduce((dx * wide).sum(1), norm.context.tp).mul_(rstd.square()).div_(norm.copies * norm.features)
        dx = dx.addcmul_(wide, share.unsqueeze(1), value=-1).mul_(rstd.unsqueeze(1)).to(x.dtype)
        norm.context.weight_grads.submit_vectors(lambda: [rmsnorm_weight_grad(dy, x, rstd)], norm.owner)
        return dx, None, None


class _OwnedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, owner, eps, offset, weight_grads):
        weight = weight.to(wide_dtype(weight)) + 1.0 if offset else weight
        y, h, rstd = rmsnorm(x, weight, eps, residual)
        ctx.save_for_backward(h, weight, rstd)
        ctx.owner, ctx.weight_grads = owner, weight_grads
        return (y,) if residual is None else (y, h)

    @staticmethod
    def backward(ctx, dy, dh=None):
        h, weight, rstd = ctx.saved_tensors
        dx = rmsnorm_input_grad(dy, h, weight, rstd, dh) if any(ctx.needs_input_grad[:2]) else None
        ctx.weight_grads.submit_vectors(lambda: [rmsnorm_weight_grad(dy, h, rstd)], ctx.owner)
        return dx, dx if ctx.needs_input_grad[1] else None, *(None,) * 5


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
