"""A layer of the residual stream: attention, then MLP, each with its norms."""

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megapar.config.schema import ModelConfig
from megapar.kernels.dropout import dropout
from megapar.models.attention import Attention
from megapar.models.mlp import MLP
from megapar.models.tokens import Tokens
from megapar.parallel.context import StageContext
from megapar.parallel.norms import Norm

SITE_EMBEDDING, SITE_ATTENTION, SITE_MLP = range(3)


class HiddenDropout(nn.Module):
    """Dropout keyed by (seed, step, layer, site, global sample, position, channel): x [t, H] -> [t, H].

    residual [t, H]: what is added, in the same pass.
    """

    def __init__(self, context: StageContext, rate: float, layer: int, site: int) -> None:
        super().__init__()
        self.seed, self.rate, self.layer, self.site = context.seed, rate, layer, site

    def forward(self, x_tH: Tensor, tokens: Tokens, residual: Tensor | None = None) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x_tH if residual is None else residual + x_tH
        site = (self.seed, tokens.step, self.layer, self.site)
        return dropout(x_tH, self.rate, tokens.local_samples, tokens.local_places, site, residual)


class TransformerLayer(nn.Module):
    """Residual block: x [t, H] -> [t, H]. recompute: `none`, `selective` (attention) or `full`.

    Of f, attention or MLP, by `model.norm_order`: pre x + f(norm(x)); post norm(x + f(x)) (Vaswani et al. 2017);
    output x + norm(f(x)) (OLMo 2); sandwich x + norm_out(f(norm(x))) (Gemma 2).
    """

    def __init__(self, context: StageContext, model: ModelConfig, index: int, recompute: str) -> None:
        super().__init__()
        name = f"layers.{index}"
        self.recompute = recompute == "full"
        self.order, sandwich = model.norm_order, model.norm_order == "sandwich"
        self.norm1 = norm(context, model, f"{name}.norm1")
        self.attention = Attention(context, model, index, recompute == "selective")
        self.norm1_out = norm(context, model, f"{name}.norm1_out") if sandwich else None
        self.dropout1 = HiddenDropout(context, model.dropout, index, SITE_ATTENTION)
        self.norm2 = norm(context, model, f"{name}.norm2")
        self.mlp = MLP(context, model, f"{name}.mlp")
        self.norm2_out = norm(context, model, f"{name}.norm2_out") if sandwich else None
        self.dropout2 = HiddenDropout(context, model.dropout, index, SITE_MLP)

    def forward(self, x_tH: Tensor, tokens: Tokens) -> Tensor:
        if self.recompute and self.training:
            return checkpoint(self._forward, x_tH, tokens, use_reentrant=False, preserve_rng_state=False)
        return self._forward(x_tH, tokens)

    def _forward(self, x_tH: Tensor, tokens: Tokens) -> Tensor:
        match self.order:
            case "post":
                x_tH, _ = self.norm1.of_sum(self.dropout1(self.attention(x_tH, tokens), tokens), x_tH)
                return self.norm2.of_sum(self.dropout2(self.mlp(x_tH), tokens), x_tH)[0]
            case "output":
                x_tH = self.dropout1(self.norm1(self.attention(x_tH, tokens)), tokens, residual=x_tH)
                return self.dropout2(self.norm2(self.mlp(x_tH)), tokens, residual=x_tH)
        attended = self.attention(self.norm1(x_tH), tokens)
        if self.norm1_out is not None:
            attended = self.norm1_out(attended)
        y_tH, x_tH = self.norm2.of_sum(self.dropout1(attended, tokens), x_tH)
        y_tH = self.mlp(y_tH)
        return self.dropout2(y_tH if self.norm2_out is None else self.norm2_out(y_tH), tokens, residual=x_tH)


def norm(context: StageContext, model: ModelConfig, name: str) -> Norm:
    """The model's norm of the hidden width."""
    return Norm(context, name, model.hidden, kind=model.norm, eps=model.norm_eps, offset=model.norm_offset)
