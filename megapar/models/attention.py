"""Grouped-query self-attention."""

from typing import Any

import torch
from torch import Tensor, nn

from megapar.config.policy import layer_linears
from megapar.config.schema import ModelConfig
from megapar.models.linear import column, row
from megapar.models.tokens import Tokens
from megapar.parallel.attend import attend_
from megapar.parallel.context import StageContext
from megapar.parallel.norms import HeadsNorm, Norm
from megapar.parallel.rotary import Rotary


class Attention(nn.Module):
    """x [t, H] -> [t, H] of a layer, named `name`, the model's number `index`. recompute: attention itself, without its
    projections, again in backward."""

    def __init__(self, context: StageContext, model: ModelConfig, name: str, index: int, recompute: bool) -> None:
        super().__init__()
        assert model.head_dim is not None, "resolve the configuration first"
        linears = layer_linears(model)
        self.index = index
        self.rotary, self.channels, self.recompute = Rotary.of(model, index), model.head_dim, recompute
        self.causal, self.scale, self.softcap = model.causal, model.attention_scale, model.attention_softcap
        self.window = model.window if model.windowed(index) else None
        self.qkv = column(context, model, linears["attention.qkv"], f"{name}.")
        self.qk_norm = QKNorm(context, model, name) if model.qk_norm != "none" else None
        self.out = row(context, model, linears["attention.out"], f"{name}.")

    def forward(self, x_tH: Tensor, tokens: Tokens, bias: Tensor | None = None) -> Tensor:
        """bias: of the scores, [N, S, S]."""
        qkv_TW = self.qkv(x_tH)
        if self.qk_norm is not None:
            qkv_TW = self.qk_norm(qkv_TW, self.qkv.sizes)
        heads, kv_heads, _ = (size // self.channels for size in self.qkv.sizes)
        table, length = (None, tokens.length) if self.rotary is None else tokens.rope_table(self.rotary)
        y_TC = attend_(
            qkv_TW, heads, kv_heads, length, table=table, starts=tokens.starts, causal=self.causal, window=self.window,
            scale=self.scale, softcap=self.softcap, bias=bias, recompute=self.recompute and self.training,
            new=tokens.new, layer=self.index,
        )  # fmt: skip
        return self.out(y_TC)


class QKNorm(nn.Module):
    """RMSNorm of q and k, of every head alone or of all heads of a token: qkv [T, (N + 2K) D] -> the same shape."""

    def __init__(self, context: StageContext, model: ModelConfig, name: str) -> None:
        super().__init__()
        assert model.head_dim and model.kv_heads, "resolve the configuration first"
        self.channels = model.head_dim if model.qk_norm == "head" else None
        norms: list[nn.Module] = []
        for which, heads in (("q", model.heads), ("k", model.kv_heads)):
            if model.qk_norm == "head":
                facts: Any = {"kind": "rmsnorm", "eps": model.norm_eps, "offset": model.norm_offset}
                norms.append(Norm(context, f"{name}.{which}_norm", model.head_dim, sees="heads", **facts))
            else:
                width = heads * model.head_dim
                norms.append(HeadsNorm(context, f"{name}.{which}_norm", width, blocks=heads, eps=model.norm_eps))
        self.q, self.k = norms

    def forward(self, qkv_TW: Tensor, sizes: list[int]) -> Tensor:
        """sizes: columns of q, k and v on this rank."""
        q, k, v = qkv_TW.split(sizes, 1)
        return torch.cat([self._of(self.q, q), self._of(self.k, k), v], 1)

    def _of(self, norm: nn.Module, x: Tensor) -> Tensor:
        if self.channels is None:
            return norm(x)
        return norm(x.reshape(-1, self.channels)).view(len(x), -1)
