"""Token ids to the residual stream."""

from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor, nn

from megapar.config.schema import ModelConfig
from megapar.config.stacks import TRUNK, prefix
from megapar.models.layer import SITE_EMBEDDING, HiddenDropout, norm
from megapar.models.media import Places
from megapar.models.tokens import Tokens
from megapar.parallel.context import StageContext
from megapar.parallel.layers import ReplicatedEmbedding, VocabParallelEmbedding
from megapar.parallel.record import Normal


class Embedding(nn.Module):
    """ids [B, S], and learned positions and token types, to x [t, H]; in a model of media their tokens take the places
    that are theirs. positions: rows of their table; shared: its table of tokens is another part's, too."""

    def __init__(
        self, context: StageContext, model: ModelConfig, positions: int, stack: str = TRUNK, shared: bool = False
    ) -> None:
        super().__init__()
        assert model.vocab_size is not None, "resolve the configuration first"
        init, begin = Normal(model.init_std), prefix(stack)
        name, tie = ("embedding", "embedding") if shared else (f"{begin}embedding", None)
        self.tokens = VocabParallelEmbedding(context, name, model.vocab_size, model.hidden, init=init, tie=tie)
        self.scale = model.embedding_scale
        self.positions: ReplicatedEmbedding | None = None
        if model.position == "learned":
            self.positions = ReplicatedEmbedding(context, f"{begin}positions", positions, model.hidden, init=init)
        self.types: ReplicatedEmbedding | None = None
        if model.token_types:
            self.types = ReplicatedEmbedding(context, f"{begin}token_types", model.token_types, model.hidden, init=init)
        self.media = Places(context, model) if model.has_media else None
        self.norm = norm(context, model, f"{begin}embedding_norm") if model.embedding_norm else None
        self.dropout = HiddenDropout(context, model.dropout, stack, 0, SITE_EMBEDDING)

    def forward(self, ids: Tensor, tokens: Tokens, media: Mapping[str, Tensor] = MappingProxyType({})) -> Tensor:
        """media: the tokens of each medium that the micro-batch has, [t', H]."""
        x_tH = self.tokens(ids.reshape(-1))
        if self.scale != 1.0:
            x_tH = x_tH * self.scale
        if self.media is not None:
            x_tH = self.media(x_tH, tokens, media)
        if self.positions is not None:
            x_tH = x_tH + self.positions(tokens.local_positions)
        if self.types is not None:
            x_tH = x_tH + self.types(tokens.local_types)
        if self.norm is not None:
            x_tH = self.norm(x_tH)
        return self.dropout(x_tH, tokens)
