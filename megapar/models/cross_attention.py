"""Attention of a decoder to its encoder's output (Vaswani et al. 2017, section 3.2.3)."""

from torch import Tensor, nn

from megapar.config.policy import layer_linears
from megapar.config.schema import ModelConfig
from megapar.models.linear import column, row
from megapar.models.tokens import Memory, Tokens
from megapar.parallel.attend import attend_across
from megapar.parallel.cache import attend_source
from megapar.parallel.context import StageContext


class CrossAttention(nn.Module):
    """x [t, H] -> [t, H] of layer `index`: queries of x, keys and values of the memory. Without positions: an encoder
    says where its tokens stand. recompute: attention itself, without its projections, again in backward."""

    def __init__(self, context: StageContext, model: ModelConfig, index: int, recompute: bool) -> None:
        super().__init__()
        assert model.head_dim is not None, "resolve the configuration first"
        linears, name = layer_linears(model, cross=True), f"layers.{index}.cross."
        self.index, self.channels, self.recompute = index, model.head_dim, recompute
        self.scale, self.softcap = model.attention_scale, model.attention_softcap
        self.q = column(context, model, linears["cross.q"], name)
        self.kv = column(context, model, linears["cross.kv"], name)
        self.out = row(context, model, linears["cross.out"], name)

    def forward(self, x_tH: Tensor, tokens: Tokens, memory: Memory | None) -> Tensor:
        heads, kv_heads = self.q.sizes[0] // self.channels, self.kv.sizes[0] // self.channels
        if tokens.new is not None:
            q = self.q(x_tH).view(len(x_tH), heads, -1)
            kv = None if memory is None else self.kv(memory.x_tH)
            return self.out(attend_source(q, kv, kv_heads, tokens.new, self.index, self.scale, self.softcap))
        assert memory is not None
        y_TC = attend_across(
            self.q(x_tH), self.kv(memory.x_tH), heads, kv_heads, (tokens.length, memory.tokens.length),
            starts=(tokens.starts, memory.tokens.starts), scale=self.scale, softcap=self.softcap,
            recompute=self.recompute and self.training,
        )  # fmt: skip
        return self.out(y_TC)
