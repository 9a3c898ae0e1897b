"""The residual stream to logits."""

from torch import Tensor, nn

from megapar.config.policy import head_linear
from megapar.config.schema import ModelConfig
from megapar.models.linear import column
from megapar.parallel.context import StageContext
from megapar.parallel.layers import Norm


class Head(nn.Module):
    """The last norm and the product to logits: x [t, H] -> [T, V]. Tied: it multiplies by the embedding's weight.

    first_id: the token of this rank's first logit.
    """

    def __init__(self, context: StageContext, model: ModelConfig) -> None:
        super().__init__()
        self.norm = Norm(context, "norm", model.hidden, kind=model.norm, eps=model.norm_eps)
        self.logits = column(context, model, head_linear(model), "", tie="embedding" if model.tied else None)
        self.first_id = self.logits.owner.pieces[0].shard.box[0].start

    def forward(self, x_tH: Tensor) -> Tensor:
        return self.logits(self.norm(x_tH))
