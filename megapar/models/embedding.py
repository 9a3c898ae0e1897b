"""Token ids to the residual stream."""

from torch import Tensor, nn

from megapar.config.schema import ModelConfig
from megapar.models.layer import SITE_EMBEDDING, HiddenDropout
from megapar.models.tokens import Tokens
from megapar.parallel.context import StageContext
from megapar.parallel.layers import PositionEmbedding, VocabParallelEmbedding
from megapar.parallel.record import Normal


class Embedding(nn.Module):
    """ids [B, S] (and learned positions) to x [t, H]. positions: rows of the learned table."""

    def __init__(self, context: StageContext, model: ModelConfig, positions: int) -> None:
        super().__init__()
        assert model.vocab_size is not None, "resolve the configuration first"
        init, tie = Normal(model.init_std), "embedding" if model.tied else None
        self.tokens = VocabParallelEmbedding(context, "embedding", model.vocab_size, model.hidden, init=init, tie=tie)
        self.positions: PositionEmbedding | None = None
        if model.position == "learned":
            self.positions = PositionEmbedding(context, "positions", positions, model.hidden, init=init)
        self.dropout = HiddenDropout(context, model.dropout, 0, SITE_EMBEDDING)

    def forward(self, ids: Tensor, tokens: Tokens) -> Tensor:
        x_tH = self.tokens(ids.reshape(-1))
        if self.positions is not None:
            x_tH = x_tH + self.positions(tokens.local_positions)
        return self.dropout(x_tH, tokens)
