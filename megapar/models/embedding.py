"""Token ids to the residual stream."""

from torch import Tensor, nn

from megapar.config.schema import ModelConfig
from megapar.models.layer import SITE_EMBEDDING, HiddenDropout, norm
from megapar.models.tokens import Tokens
from megapar.parallel.context import StageContext
from megapar.parallel.layers import ReplicatedEmbedding, VocabParallelEmbedding
from megapar.parallel.record import Normal


class Embedding(nn.Module):
    """ids [B, S], and learned positions and token types, to x [t, H]. positions: rows of their table; encoder: it is
    an encoder's, beside a decoder's."""

    def __init__(self, context: StageContext, model: ModelConfig, positions: int, encoder: bool = False) -> None:
        super().__init__()
        assert model.vocab_size is not None, "resolve the configuration first"
        init, prefix = Normal(model.init_std), "encoder." if encoder else ""
        shared = model.encoder.shared if encoder else model.shares_embedding
        name, tie = ("embedding", "embedding") if shared else (f"{prefix}embedding", None)
        self.tokens = VocabParallelEmbedding(context, name, model.vocab_size, model.hidden, init=init, tie=tie)
        self.scale = model.embedding_scale
        self.positions: ReplicatedEmbedding | None = None
        if model.position == "learned":
            self.positions = ReplicatedEmbedding(context, f"{prefix}positions", positions, model.hidden, init=init)
        self.types: ReplicatedEmbedding | None = None
        if model.token_types:
            self.types = ReplicatedEmbedding(
                context, f"{prefix}token_types", model.token_types, model.hidden, init=init
            )
        self.norm = norm(context, model, f"{prefix}embedding_norm") if model.embedding_norm else None
        self.dropout = HiddenDropout(context, model.dropout, model.layers if encoder else 0, SITE_EMBEDDING)

    def forward(self, ids: Tensor, tokens: Tokens) -> Tensor:
        x_tH = self.tokens(ids.reshape(-1))
        if self.scale != 1.0:
            x_tH = x_tH * self.scale
        if self.positions is not None:
            x_tH = x_tH + self.positions(tokens.local_positions)
        if self.types is not None:
            x_tH = x_tH + self.types(tokens.local_types)
        if self.norm is not None:
            x_tH = self.norm(x_tH)
        return self.dropout(x_tH, tokens)
