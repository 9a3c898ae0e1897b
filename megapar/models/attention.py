"""Grouped-query self-attention."""

from functools import partial

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megapar.config.policy import layer_linears
from megapar.config.schema import ModelConfig
from megapar.kernels.rope import rope
from megapar.models.linear import column, row
from megapar.models.tokens import Tokens
from megapar.parallel.attend import attend
from megapar.parallel.context import StageContext


class Attention(nn.Module):
    """x [t, H] -> [t, H]. recompute: attention itself, without its projections, again in backward."""

    def __init__(self, context: StageContext, model: ModelConfig, name: str, recompute: bool) -> None:
        super().__init__()
        assert model.head_dim is not None, "resolve the configuration first"
        linears = layer_linears(model)
        self.rotates, self.theta, self.channels = model.position == "rope", model.rope_theta, model.head_dim
        self.recompute = recompute
        self.qkv = column(context, model, linears["attention.qkv"], f"{name}.")
        self.out = row(context, model, linears["attention.out"], f"{name}.")

    def forward(self, x_tH: Tensor, tokens: Tokens) -> Tensor:
        q, k, v = (
            part.unflatten(0, (-1, tokens.length)).unflatten(2, (-1, self.channels))  # [B, S, N, D]
            for part in self.qkv(x_tH).split(self.qkv.sizes, 1)
        )
        if self.rotates:
            q, k = rope(q, k, tokens.rope_table(self.channels, self.theta))
        attention = partial(attend, starts=tokens.starts)
        if self.recompute and self.training:
            y = checkpoint(attention, q, k, v, use_reentrant=False, preserve_rng_state=False)
        else:
            y = attention(q, k, v)
        return self.out(y.flatten(2).flatten(0, 1))
