"""A stage of a Transformer: a run of the model's parts."""

from collections.abc import Sequence

from torch import nn

from megapar.config.model import Part
from megapar.config.schema import TrainConfig
from megapar.config.stages import stage_parts
from megapar.models.embedding import Embedding
from megapar.models.head import Classifier, Head, HiddenStates
from megapar.models.layer import TransformerLayer
from megapar.models.tokens import Tokens
from megapar.parallel.cache import KVCache
from megapar.parallel.context import StageContext
from megapar.pipeline.stage import Batch, Tensors, TensorSpec
from megapar.trace.spans import LAYERS, layers_of


class TransformerStage(nn.Module):
    """The parts of one stage, in order.

    forward(received, batch) -> what the next stage receives, such as {"hidden": [t, H]}; from the last one
    {"logits": [T, V]}, or what `HiddenStates` or `Classifier` gives. Nothing is received in front of the first part.
    With a cache the batch's tokens are new ones of texts that are being written (`parallel/cache.py`), and the logits
    are those behind every text's last token, [n, V].
    sends: names of the tensors that the next stage receives.
    """

    def __init__(
        self, context: StageContext, config: TrainConfig, parts: Sequence[Part], sends: tuple[str, ...] = ()
    ) -> None:
        super().__init__()
        model, train = config.model, config.train
        self.context, self.hidden, self.number = context, model.hidden, context.stage
        self.receives, self.sends = parts[0].receives, sends
        self.embedding: Embedding | None = None
        self.head: Head | HiddenStates | None = None
        # By number in the whole model, so that a module has the same path whatever stage it is on.
        self.layers = nn.ModuleDict()
        for part in parts:
            context.part = part
            match part.kind:
                case "embedding":
                    self.embedding = Embedding(context, model, train.seq_length)
                case "layer":
                    index = part.name.rpartition(".")[2]
                    self.layers[index] = TransformerLayer(context, model, int(index), train.recompute)
                case "head":
                    self.head = {"hidden": HiddenStates, "classes": Classifier}.get(model.output, Head)(context, model)
        context.part = None

    def received(self, batch: Batch) -> dict[str, TensorSpec]:
        """What the stage receives for this batch."""
        return self._specs(self.receives, batch)

    def sent(self, batch: Batch) -> dict[str, TensorSpec]:
        """What the stage sends for this batch."""
        return self._specs(self.sends, batch)

    def _specs(self, names: Sequence[str], batch: Batch) -> dict[str, TensorSpec]:
        tokens = self.context.local_tokens(batch["ids"].numel())
        shapes = {"hidden": (tokens.stop - tokens.start, self.hidden)}
        return {name: TensorSpec(shapes[name], self.context.dtype) for name in names}

    def forward(self, received: Tensors, batch: Batch, cache: KVCache | None = None) -> Tensors:
        tokens = Tokens.of(batch, self.context, cache)
        x_tH = received["hidden"] if self.embedding is None else self.embedding(batch["ids"], tokens)
        with self.context.mesh.timeline.span(LAYERS, layers_of(self.number)):
            for layer in self.layers.values():
                x_tH = layer(x_tH, tokens)
        if isinstance(self.head, HiddenStates):
            return self.head(x_tH, tokens)
        if self.head is None:
            return {"hidden": x_tH}
        return {"logits": self.head(x_tH if tokens.new is None else x_tH[tokens.new.last])}


def build_stage(config: TrainConfig, context: StageContext) -> TransformerStage:
    """The context's current stage of the configured model. No memory is taken and nothing is communicated."""
    stages = stage_parts(config)
    following = stages[context.stage + 1 : context.stage + 2]
    sends = following[0][0].receives if following else ()
    return TransformerStage(context, config, stages[context.stage], sends)
