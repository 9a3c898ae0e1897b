"""A layer of the residual stream: attention, then MLP, each behind its norm."""

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megapar.config.schema import ModelConfig
from megapar.kernels.dropout import dropout
from megapar.models.attention import Attention
from megapar.models.mlp import MLP
from megapar.models.tokens import Tokens
from megapar.parallel.context import StageContext
from megapar.parallel.layers import Norm

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
        return dropout(x_tH, self.rate, tokens.local_samples, tokens.local_positions, site, residual)


class TransformerLayer(nn.Module):
    """Pre-norm residual block: x [t, H] -> [t, H]. recompute: `none`, `selective` (attention) or `full`."""

    def __init__(self, context: StageContext, model: ModelConfig, index: int, recompute: str) -> None:
        super().__init__()
        name = f"layers.{index}"
        self.recompute = recompute == "full"
        self.norm1 = Norm(context, f"{name}.norm1", model.hidden, kind=model.norm, eps=model.norm_eps)
        self.attention = Attention(context, model, f"{name}.attention", recompute == "selective")
        self.dropout1 = HiddenDropout(context, model.dropout, index, SITE_ATTENTION)
        self.norm2 = Norm(context, f"{name}.norm2", model.hidden, kind=model.norm, eps=model.norm_eps)
        self.mlp = MLP(context, model, f"{name}.mlp")
        self.dropout2 = HiddenDropout(context, model.dropout, index, SITE_MLP)

    def forward(self, x_tH: Tensor, tokens: Tokens) -> Tensor:
        if self.recompute and self.training:
            return checkpoint(self._forward, x_tH, tokens, use_reentrant=False, preserve_rng_state=False)
        return self._forward(x_tH, tokens)

    def _forward(self, x_tH: Tensor, tokens: Tokens) -> Tensor:
        y_tH, x_tH = self.norm2.of_sum(self.dropout1(self.attention(self.norm1(x_tH), tokens), tokens), x_tH)
        return self.dropout2(self.mlp(y_tH), tokens, residual=x_tH)
