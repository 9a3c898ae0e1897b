"""A layer of the residual stream: attention, in a decoder behind an encoder attention to its output, then the MLP, each
with its norms."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megapar.config.schema import ModelConfig
from megapar.config.stacks import STACKS, TRUNK, prefix
from megapar.kernels.dropout import dropout
from megapar.models.attention import Attention
from megapar.models.cross_attention import CrossAttention
from megapar.models.mlp import MLP
from megapar.models.tokens import Memory, Tokens
from megapar.parallel.context import StageContext
from megapar.parallel.norms import Norm

SITE_EMBEDDING, SITE_ATTENTION, SITE_MLP, SITE_CROSS = SITES = range(4)


class HiddenDropout(nn.Module):
    """Dropout keyed by (seed, step, layer, site, global sample, position, channel): x [t, H] -> [t, H].

    site: in a layer of a stack. residual [t, H]: what is added, in the same pass.
    """

    def __init__(self, context: StageContext, rate: float, stack: str, layer: int, site: int) -> None:
        super().__init__()
        self.seed, self.rate, self.layer = context.seed, rate, layer
        self.site = site + STACKS.index(stack) * len(SITES)

    def forward(self, x_tH: Tensor, tokens: Tokens, residual: Tensor | None = None) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x_tH if residual is None else residual + x_tH
        site = (self.seed, tokens.step, self.layer, self.site)
        return dropout(x_tH, self.rate, tokens.local_samples, tokens.local_places, site, residual)


class _Step(NamedTuple):
    """A function of the residual stream with its norms and its dropout."""

    norm: Norm
    compute: Callable[[Tensor], Tensor]
    norm_out: Norm | None
    dropout: HiddenDropout


class TransformerLayer(nn.Module):
    """Residual block: x [t, H] -> [t, H]. recompute: `none`, `selective` (attention) or `full`.

    Of f, attention or MLP, by `model.norm_order`: pre x + f(norm(x)); post norm(x + f(x)) (Vaswani et al. 2017);
    output x + norm(f(x)) (OLMo 2); sandwich x + norm_out(f(norm(x))) (Gemma 2).
    stack: that it is of, whose sizes `model` has. A decoder behind an encoder attends to its output between the two.
    """

    def __init__(
        self, context: StageContext, model: ModelConfig, index: int, recompute: str, stack: str = TRUNK
    ) -> None:
        super().__init__()
        name = f"{prefix(stack)}layers.{index}"
        hidden_dropout = partial(HiddenDropout, context, model.dropout, stack, index)
        self.recompute = recompute == "full"
        self.order, sandwich = model.norm_order, model.norm_order == "sandwich"
        self.norm1 = norm(context, model, f"{name}.norm1")
        self.attention = Attention(context, model, f"{name}.attention", index, recompute == "selective")
        self.norm1_out = norm(context, model, f"{name}.norm1_out") if sandwich else None
        self.dropout1 = hidden_dropout(SITE_ATTENTION)
        self.cross: CrossAttention | None = None
        if model.encoder.layers:
            self.cross_norm = norm(context, model, f"{name}.cross_norm")
            self.cross = CrossAttention(context, model, index, recompute == "selective")
            self.cross_norm_out = norm(context, model, f"{name}.cross_norm_out") if sandwich else None
            self.cross_dropout = hidden_dropout(SITE_CROSS)
        self.norm2 = norm(context, model, f"{name}.norm2")
        self.mlp = MLP(context, model, f"{name}.mlp")
        self.norm2_out = norm(context, model, f"{name}.norm2_out") if sandwich else None
        self.dropout2 = hidden_dropout(SITE_MLP)

    def forward(self, x_tH: Tensor, tokens: Tokens, bias: Tensor | None = None, memory: Memory | None = None) -> Tensor:
        """bias: of the scores of attention, [N, S, S]; memory: the encoder's output."""
        if self.recompute and self.training:
            args = x_tH, tokens, bias, memory
            return checkpoint(self._forward, *args, use_reentrant=False, preserve_rng_state=False)
        return self._forward(x_tH, tokens, bias, memory)

    def _forward(self, x_tH: Tensor, tokens: Tokens, bias: Tensor | None, memory: Memory | None) -> Tensor:
        steps = self._steps(tokens, bias, memory)
        match self.order:
            case "post":
                for step in steps:
                    x_tH, _ = step.norm.of_sum(step.dropout(step.compute(x_tH), tokens), x_tH)
                return x_tH
            case "output":
                for step in steps:
                    x_tH = step.dropout(step.norm(step.compute(x_tH)), tokens, residual=x_tH)
                return x_tH
        y_tH = steps[0].norm(x_tH)
        for step, following in zip(steps, [*steps[1:], None], strict=True):
            y_tH = step.compute(y_tH)
            if step.norm_out is not None:
                y_tH = step.norm_out(y_tH)
            if following is None:
                x_tH = step.dropout(y_tH, tokens, residual=x_tH)
            else:
                y_tH, x_tH = following.norm.of_sum(step.dropout(y_tH, tokens), x_tH)
        return x_tH

    def _steps(self, tokens: Tokens, bias: Tensor | None, memory: Memory | None) -> list[_Step]:
        attention, cross = self.attention, self.cross
        steps = [_Step(self.norm1, lambda x_tH: attention(x_tH, tokens, bias), self.norm1_out, self.dropout1)]
        if cross is not None:
            attend = partial(cross, tokens=tokens, memory=memory)
            steps.append(_Step(self.cross_norm, attend, self.cross_norm_out, self.cross_dropout))
        return [*steps, _Step(self.norm2, self.mlp, self.norm2_out, self.dropout2)]


def norm(context: StageContext, model: ModelConfig, name: str) -> Norm:
    """The model's norm of the hidden width."""
    return Norm(context, name, model.hidden, kind=model.norm, eps=model.norm_eps, offset=model.norm_offset)
