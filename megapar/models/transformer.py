"""A decoder-only Transformer, Llama-style or GPT-2-style by its configuration.

Shape letters: T tokens of a micro-batch (sample b, position s is token b*S + s), B samples, S positions, H hidden,
N query heads, K key/value heads, D channels of a head, F inner width of the MLP, V vocabulary. Under tensor parallelism
N, K, F and V are this rank's share; under sequence parallelism so is T outside attention and MLP (written t).

The tensor-parallel policy (each row is one constructor call below):

| part           | split      | weight                   | reads       | writes      |
|----------------|------------|--------------------------|-------------|-------------|
| embedding      | vocabulary | rows (token ids)         | ids [T]     | x [t, H]    |
| norms          | none       | the same on every rank   | x [t, H]    | x [t, H]    |
| attention.qkv  | column     | heads                    | x [t, H]    | qkv [T, ..] |
| attention.out  | row        | heads                    | y [T, N*D]  | x [t, H]    |
| mlp.up (gate)  | column     | inner features           | x [t, H]    | h [T, F]    |
| mlp.down       | row        | inner features           | h [T, F]    | x [t, H]    |
| head           | column     | rows (token ids)         | x [t, H]    | logits [T, V] |
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megapar.config.schema import ModelConfig
from megapar.kernels.attention import attention
from megapar.kernels.dropout import dropout, token_keys
from megapar.kernels.rope import rope, rope_table
from megapar.kernels.swiglu import geglu, gelu, swiglu
from megapar.parallel.layers import (
    ColumnParallelLinear,
    Norm,
    PositionEmbedding,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megapar.parallel.record import Normal
from megapar.parallel.stage import StageContext
from megapar.trace import LAYERS, layers_of

SITE_EMBEDDING, SITE_ATTENTION, SITE_MLP = range(3)
ACTIVATIONS: dict[str, Callable[..., Tensor]] = {"swiglu": swiglu, "geglu": geglu, "gelu": gelu}


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor that passes between stages."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Shape:
    """A Transformer's sizes with every default filled in."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab_size: int

    @classmethod
    def of(cls, model: ModelConfig) -> "Shape":
        kv_heads, head_dim, ffn, vocab_size = model.kv_heads, model.head_dim, model.ffn, model.vocab_size
        assert None not in (kv_heads, head_dim, ffn, vocab_size), "resolve the configuration first"
        return cls(model.hidden, model.heads, kv_heads, head_dim, ffn, vocab_size)  # type: ignore[arg-type]


class HiddenDropout(nn.Module):
    """Dropout keyed by (seed, step, layer, site, global sample, position, channel)."""

    def __init__(self, context: StageContext, rate: float, layer: int, site: int) -> None:
        super().__init__()
        self.context, self.rate, self.layer, self.site = context, rate, layer, site

    def forward(self, x_tH: Tensor, batch: dict[str, Tensor]) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x_tH
        samples, positions = token_coordinates(batch)
        mine = self.context.local_tokens(samples.numel())
        step = int(batch["step"])
        keys = token_keys(samples[mine], positions[mine], self.context.seed, step, self.layer, self.site)
        return dropout(x_tH, self.rate, keys)


def token_coordinates(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Global sample number and position of every token, [T] each."""
    samples, length = batch["samples"], batch["ids"].shape[1]
    positions = torch.arange(length, device=samples.device).repeat(samples.numel())
    return samples.repeat_interleave(length), positions


class Attention(nn.Module):
    """Grouped-query self-attention: x [t, H] -> [t, H]."""

    def __init__(self, context: StageContext, model: ModelConfig, name: str, recompute: bool) -> None:
        super().__init__()
        shape = Shape.of(model)
        self.context, self.theta, self.recompute = context, model.rope_theta, recompute
        self.rotates, self.head_dim = model.position == "rope", shape.head_dim
        width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.qkv = ColumnParallelLinear(
            context,
            shape.hidden,
            [
                (f"{name}.q", width, shape.heads),
                (f"{name}.k", kv_width, shape.kv_heads),
                (f"{name}.v", kv_width, shape.kv_heads),
            ],
            init=Normal(model.init_std),
            bias=model.bias,
        )
        self.out = RowParallelLinear(
            context, f"{name}.out", width, shape.hidden, init=residual_init(model), bias=model.bias, blocks=shape.heads
        )

    def forward(self, x_tH: Tensor, batch: dict[str, Tensor]) -> Tensor:
        batch_size, length = batch["ids"].shape
        q, k, v = (
            rearrange(part, "(b s) (n d) -> b s n d", b=batch_size, d=self.head_dim)
            for part in self.qkv(x_tH).split(self.qkv.sizes, 1)
        )
        if self.rotates:
            table = rope_table(length, self.head_dim, self.theta, self.context.wide_dtype, q.device)
            q, k = rope(q, k, table)
        if self.recompute and self.training:
            y = checkpoint(attention, q, k, v, use_reentrant=False, preserve_rng_state=False)
        else:
            y = attention(q, k, v)
        return self.out(rearrange(y, "b s n d -> (b s) (n d)"))


class MLP(nn.Module):
    """x [t, H] -> [t, H] through an inner width F: SwiGLU or GEGLU with a gate, or GELU."""

    def __init__(self, context: StageContext, model: ModelConfig, name: str) -> None:
        super().__init__()
        shape = Shape.of(model)
        self.gated, self.activation = model.gated, ACTIVATIONS[model.activation]
        outputs: list[tuple[str, int, int | None]] = [(f"{name}.up", shape.ffn, None)]
        if self.gated:
            outputs.insert(0, (f"{name}.gate", shape.ffn, None))
        init = Normal(model.init_std)
        self.up = ColumnParallelLinear(context, shape.hidden, outputs, init=init, bias=model.bias)
        self.down = RowParallelLinear(
            context, f"{name}.down", shape.ffn, shape.hidden, init=residual_init(model), bias=model.bias
        )

    def forward(self, x_tH: Tensor) -> Tensor:
        h_TF = self.up(x_tH)
        if self.gated:
            return self.down(self.activation(*h_TF.split(self.up.sizes, 1)))
        return self.down(self.activation(h_TF))


class TransformerLayer(nn.Module):
    """Pre-norm residual block: attention, then MLP."""

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

    def forward(self, x_tH: Tensor, batch: dict[str, Tensor]) -> Tensor:
        if self.recompute and self.training:
            return checkpoint(self._forward, x_tH, batch, use_reentrant=False, preserve_rng_state=False)
        return self._forward(x_tH, batch)

    def _forward(self, x_tH: Tensor, batch: dict[str, Tensor]) -> Tensor:
        y_tH, x_tH = self.norm2.of_sum(self.dropout1(self.attention(self.norm1(x_tH), batch), batch), x_tH)
        return x_tH + self.dropout2(self.mlp(y_tH), batch)


class Embedding(nn.Module):
    """Token ids (and learned positions) to the residual stream: batch -> x [t, H]."""

    def __init__(self, context: StageContext, model: ModelConfig, positions: int) -> None:
        super().__init__()
        shape = Shape.of(model)
        self.context = context
        init = Normal(model.init_std)
        self.tokens = VocabParallelEmbedding(
            context, "embedding", shape.vocab_size, shape.hidden, init=init, tie="embedding" if model.tied else None
        )
        self.positions: PositionEmbedding | None = None
        if model.position == "learned":
            self.positions = PositionEmbedding(context, "positions", positions, shape.hidden, init=init)
        self.dropout = HiddenDropout(context, model.dropout, 0, SITE_EMBEDDING)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        ids = batch["ids"].reshape(-1)
        x_tH = self.tokens(ids)
        if self.positions is not None:
            _, positions = token_coordinates(batch)
            x_tH = x_tH + self.positions(positions[self.context.local_tokens(ids.numel())])
        return self.dropout(x_tH, batch)


class Head(nn.Module):
    """The residual stream to logits: x [t, H] -> [T, V]. Tied: it multiplies by the embedding's weight."""

    def __init__(self, context: StageContext, model: ModelConfig) -> None:
        super().__init__()
        shape = Shape.of(model)
        self.norm = Norm(context, "norm", model.hidden, kind=model.norm, eps=model.norm_eps)
        self.logits = ColumnParallelLinear(
            context,
            shape.hidden,
            [("embedding" if model.tied else "head", shape.vocab_size, None)],
            init=Normal(model.init_std),
            bias=False,
            tie="embedding" if model.tied else None,
        )
        self.first_id = self.logits.owner.pieces[0].shard.start

    def forward(self, x_tH: Tensor) -> Tensor:
        return self.logits(self.norm(x_tH))


class TransformerStage(nn.Module):
    """A run of layers, with the embedding if it is the first stage and the head if it is the last.

    forward(received, batch) -> what the next stage receives: {"hidden": [t, H]}; from the last stage
    {"logits": [T, V]}. `received` is empty on the first stage.
    """

    def __init__(
        self,
        context: StageContext,
        model: ModelConfig,
        layers: range,
        *,
        first: bool,
        last: bool,
        positions: int,
        recompute: str = "none",
    ) -> None:
        super().__init__()
        self.context, self.hidden, self.number = context, model.hidden, context.stage
        self.embedding = Embedding(context, model, positions) if first else None
        # By number in the whole model, so that a module has the same path whatever stage it is on.
        self.layers = nn.ModuleDict(
            {str(index): TransformerLayer(context, model, index, recompute) for index in layers}
        )
        self.head = Head(context, model) if last else None

    def received(self, batch: dict[str, Tensor]) -> dict[str, TensorSpec]:
        """What a stage that is not the first receives for this batch."""
        tokens = self.context.local_tokens(batch["ids"].numel())
        return {"hidden": TensorSpec((tokens.stop - tokens.start, self.hidden), self.context.dtype)}

    # Every boundary carries the same tensors, so the gradients that come back look like what was received.
    sent = received

    def forward(self, received: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        x_tH = received["hidden"] if self.embedding is None else self.embedding(batch)
        with self.context.mesh.timeline.span(LAYERS, layers_of(self.number)):
            for layer in self.layers.values():
                x_tH = layer(x_tH, batch)
        return {"hidden": x_tH} if self.head is None else {"logits": self.head(x_tH)}


def residual_init(model: ModelConfig) -> Normal:
    """Projections into the residual stream start smaller, so that its variance does not grow with depth (GPT-2)."""
    return Normal(model.init_std / (2 * model.layers) ** 0.5)
