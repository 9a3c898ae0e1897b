"""A stage of a Transformer: a run of the model's parts."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from megapar.config.model import Part
from megapar.config.schema import TrainConfig
from megapar.config.stages import stage_parts
from megapar.models.embedding import Embedding
from megapar.models.head import Classifier, Head, HiddenStates
from megapar.models.layer import TransformerLayer, norm
from megapar.models.relative import RelativeBias
from megapar.models.tokens import Memory, Tokens
from megapar.parallel.cache import KVCache
from megapar.parallel.context import StageContext
from megapar.parallel.norms import Norm
from megapar.pipeline.stage import Batch, Tensors, TensorSpec
from megapar.trace.spans import LAYERS, layers_of

STREAMS = {"hidden": "ids", "memory": "source"}  # what crosses stage boundaries, and of which tokens of a batch


class Stack(nn.Module):
    """What a stage has of a stack of layers. Layers are by number in the whole model, so that a module has the same
    path whatever stage it is on."""

    def __init__(self, context: StageContext) -> None:
        super().__init__()
        self.context, self.number = context, context.stage
        self.embedding: Embedding | None = None
        self.relative: RelativeBias | None = None
        self.layers = nn.ModuleDict()

    def add(self, context: StageContext, config: TrainConfig, part: Part) -> None:
        model, train, encoder = config.model, config.train, part.stack == "encoder"
        if part.kind == "embedding":
            length = train.source_length if encoder else train.seq_length
            self.embedding = Embedding(context, model, length or 0, encoder)
            return
        index = part.name.rpartition(".")[2]
        if model.position == "relative" and self.relative is None:
            self.relative = RelativeBias(context, model, encoder)
        self.layers[index] = TransformerLayer(context, model, int(index), train.recompute, encoder)

    def read(self, x_tH: Tensor | None, ids: Tensor, tokens: Tokens, memory: Memory | None = None) -> Tensor:
        """x [t, H] behind its last layer. x: of the stage before, None: of the embedding."""
        if self.embedding is not None:
            x_tH = self.embedding(ids, tokens)
        assert x_tH is not None
        seen = self.seen(tokens, memory)
        with self.context.mesh.timeline.span(LAYERS, layers_of(self.number)):
            for layer in self.layers.values():
                x_tH = layer(x_tH, tokens, **seen)
        return x_tH

    def seen(self, tokens: Tokens, memory: Memory | None = None) -> dict[str, Any]:
        """What layers get besides, where there is any: a layer of a user's own need not know of it."""
        seen: dict[str, Any] = {"bias": None if self.relative is None else self.relative.of(tokens), "memory": memory}
        return {name: value for name, value in seen.items() if value is not None}


class EncoderStack(Stack):
    """Of an encoder beside a decoder: the last norm, too."""

    def __init__(self, context: StageContext) -> None:
        super().__init__(context)
        self.norm: Norm | None = None

    def add(self, context: StageContext, config: TrainConfig, part: Part) -> None:
        if part.kind == "norm":
            self.norm = norm(context, config.model, part.name)
        else:
            super().add(context, config, part)

    def read(self, x_tH: Tensor | None, ids: Tensor, tokens: Tokens, memory: Memory | None = None) -> Tensor:
        x_tH = super().read(x_tH, ids, tokens)
        return x_tH if self.norm is None else self.norm(x_tH)


class TransformerStage(Stack):
    """The parts of one stage, in order.

    forward(received, batch) -> what the next stage receives, such as {"hidden": [t, H]}; from the last one
    {"logits": [T, V]}, or what `HiddenStates` or `Classifier` gives. Nothing is received in front of the first part.
    Of an encoder-decoder the stream inside the encoder, {"memory": [t, H]}, is its output to all stages behind it.
    With a cache the batch's tokens are new ones of texts that are being written (`parallel/cache.py`), and the logits
    are those behind every text's last token, [n, V].
    sends: names of the tensors that the next stage receives.
    """

    def __init__(
        self, context: StageContext, config: TrainConfig, parts: Sequence[Part], sends: tuple[str, ...] = ()
    ) -> None:
        super().__init__(context)
        model = config.model
        self.hidden = model.hidden
        self.receives, self.sends = parts[0].receives, sends
        self.encoder: EncoderStack | None = EncoderStack(context) if any(part.stack for part in parts) else None
        self.decodes = not all(part.stack for part in parts)
        self.head: Head | HiddenStates | None = None
        for part in parts:
            context.part = part
            if part.stack:
                assert self.encoder is not None
                self.encoder.add(context, config, part)
            elif part.kind == "head":
                self.head = {"hidden": HiddenStates, "classes": Classifier}.get(model.output, Head)(context, model)
            else:
                self.add(context, config, part)
        context.part = None

    def received(self, batch: Batch) -> dict[str, TensorSpec]:
        """What the stage receives for this batch."""
        return self._specs(self.receives, batch)

    def sent(self, batch: Batch) -> dict[str, TensorSpec]:
        """What the stage sends for this batch."""
        return self._specs(self.sends, batch)

    def _specs(self, names: Sequence[str], batch: Batch) -> dict[str, TensorSpec]:
        shares = {name: self.context.local_tokens(batch[STREAMS[name]].numel()) for name in names}
        return {
            name: TensorSpec((share.stop - share.start, self.hidden), self.context.dtype)
            for name, share in shares.items()
            if share.stop  # of texts that are being written an encoder may have nothing to read
        }

    def forward(self, received: Tensors, batch: Batch, cache: KVCache | None = None) -> Tensors:
        streams = dict(received)
        memory = self._memory(streams, batch)
        if not self.decodes:
            return {name: streams[name] for name in self.sends if name in streams}
        tokens = Tokens.of(batch, self.context, cache)
        x_tH = streams["hidden"] = self.read(streams.get("hidden"), batch["ids"], tokens, memory)
        if isinstance(self.head, HiddenStates):
            return self.head(x_tH, tokens)
        if self.head is None:
            return {name: streams[name] for name in self.sends if name in streams}
        return {"logits": self.head(x_tH if tokens.new is None else x_tH[tokens.new.last])}

    def _memory(self, streams: Tensors, batch: Batch) -> Memory | None:
        """What decoder layers attend to; `streams` gets the encoder's, if this stage has some of it. None without an
        encoder, and where it has nothing to read."""
        if ("memory" not in streams and self.encoder is None) or not batch["source"].numel():
            return None
        source = Tokens.of_source(batch, self.context)
        if self.encoder is not None:
            streams["memory"] = self.encoder.read(streams.get("memory"), batch["source"], source)
        return Memory(streams["memory"], source)


def build_stage(config: TrainConfig, context: StageContext) -> TransformerStage:
    """The context's current stage of the configured model. No memory is taken and nothing is communicated."""
    stages = stage_parts(config)
    following = stages[context.stage + 1 : context.stage + 2]
    sends = following[0][0].receives if following else ()
    return TransformerStage(context, config, stages[context.stage], sends)
