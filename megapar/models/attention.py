"""Grouped-query self-attention."""

from torch import Tensor, nn

from megapar.config.policy import layer_linears
from megapar.config.schema import ModelConfig
from megapar.models.linear import column, row
from megapar.models.tokens import Tokens
from megapar.parallel.attend import attend_
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
        qkv_TW = self.qkv(x_tH)
        heads, kv_heads, _ = (size // self.channels for size in self.qkv.sizes)
        table = tokens.rope_table(self.channels, self.theta) if self.rotates else None
        again = self.recompute and self.training
        y_TC = attend_(qkv_TW, heads, kv_heads, tokens.length, table=table, starts=tokens.starts, recompute=again)
        return self.out(y_TC)
