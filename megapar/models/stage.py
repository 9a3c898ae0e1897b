"""A stage of a Transformer: a run of the model's parts."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from megapar.config.model import Part
from megapar.config.schema import TrainConfig
from megapar.config.stacks import MEDIA, STREAMS, TRUNK, prefix, stack_model, stack_tokens
from megapar.config.stages import stage_parts
from megapar.models.embedding import Embedding
from megapar.models.head import Classifier, Head, HiddenStates
from megapar.models.layer import TransformerLayer, norm
from megapar.models.media import MediumEmbedding, Projector
from megapar.models.relative import RelativeBias
from megapar.models.tokens import Memory, Tokens
from megapar.parallel.cache import KVCache
from megapar.parallel.context import StageContext
from megapar.parallel.norms import Norm
from megapar.pipeline.stage import Batch, Tensors, TensorSpec
from megapar.trace.spans import LAYERS, layers_of


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
        model = stack_model(config.model, part.stack)
        if part.kind == "embedding":
            length, shared = stack_tokens(config, part.stack), "embedding" in part.ties
            self.embedding = Embedding(context, model, length, part.stack, shared)
            return
        index = part.name.rpartition(".")[2]
        if model.position == "relative" and self.relative is None:
            self.relative = RelativeBias(context, model, f"{prefix(part.stack)}relative")
        self.layers[index] = TransformerLayer(context, model, int(index), config.train.recompute, part.stack)

    def through_layers(self, x_tH: Tensor, tokens: Tokens, memory: Memory | None = None) -> Tensor:
        """x [t, H] behind its last layer."""
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

    def read(self, x_tH: Tensor | None, ids: Tensor, tokens: Tokens) -> Tensor:
        """x [t, H] behind its last part. x: of the stage before, None: of the embedding."""
        if self.embedding is not None:
            x_tH = self.embedding(ids, tokens)
        assert x_tH is not None
        x_tH = self.through_layers(x_tH, tokens)
        return x_tH if self.norm is None else self.norm(x_tH)


class MediumStack(Stack):
    """Of an encoder of images or sound: it begins with what it reads, and ends in a projector."""

    def __init__(self, context: StageContext, name: str) -> None:
        super().__init__(context)
        self.name = name
        self.features: MediumEmbedding | None = None
        self.projector: Projector | None = None

    def add(self, context: StageContext, config: TrainConfig, part: Part) -> None:
        model = stack_model(config.model, part.stack)
        if part.kind == "embedding":
            self.features = MediumEmbedding(context, model, config.model, self.name)
        elif part.kind == "projector":
            self.projector = Projector(context, model, config.model.hidden, self.name)
        else:
            super().add(context, config, part)

    def read(self, streams: Tensors, batch: Batch) -> None:
        """Take its stream [t', H'] from `streams`, unless it begins here, and put there what it becomes. A micro-batch
        without this medium has none."""
        if not _tokens_of(self.name, batch):
            return
        tokens = Tokens.of_medium(batch, self.context, self.name)
        x_tH = self.features(batch, tokens) if self.features is not None else streams.pop(self.name)
        x_tH = self.through_layers(x_tH, tokens)
        if self.projector is None:
            streams[self.name] = x_tH
        else:
            streams[f"{self.name}_tokens"] = self.projector(x_tH)


class TransformerStage(Stack):
    """The parts of one stage, in order.

    forward(received, batch) -> what the next stage receives, such as {"hidden": [t, H]}; from the last one
    {"logits": [T, V]}, or what `HiddenStates` or `Classifier` gives. Nothing is received in front of the first part.
    Of an encoder-decoder the stream inside the encoder, {"memory": [t, H]}, is its output to all stages behind it.
    Those of media go as far as the embedding, which puts their tokens where they stand.
    With a cache the batch's tokens are new ones of texts that are being written (`parallel/cache.py`), and the logits
    are those behind every text's last token, [n, V].
    sends: names of the tensors that the next stage receives.
    """

    def __init__(
        self, context: StageContext, config: TrainConfig, parts: Sequence[Part], sends: tuple[str, ...] = ()
    ) -> None:
        super().__init__(context)
        model = config.model
        self.widths = {name: stack_model(model, STREAMS[name].width).hidden for name in (*parts[0].receives, *sends)}
        self.receives, self.sends = parts[0].receives, sends
        there = {part.stack for part in parts}
        self.encoder: EncoderStack | None = EncoderStack(context) if "encoder" in there else None
        self.media = nn.ModuleDict({name: MediumStack(context, name) for name in MEDIA if name in there})
        self.reads_text = TRUNK in there
        self.head: Head | HiddenStates | None = None
        for part in parts:
            context.part = part
            if part.stack in self.media:
                self.media[part.stack].add(context, config, part)  # type: ignore[operator]
            elif part.stack:
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
        counts = {name: _tokens_of(name, batch) for name in names}
        shares = {name: self.context.local_tokens(count) for name, count in counts.items() if count}
        return {
            name: TensorSpec((share.stop - share.start, self.widths[name]), self.context.dtype)
            for name, share in shares.items()
        }

    def forward(self, received: Tensors, batch: Batch, cache: KVCache | None = None) -> Tensors:
        streams = dict(received)
        for stack in self.media.values():
            stack.read(streams, batch)  # type: ignore[operator]
        memory = self._memory(streams, batch)
        if not self.reads_text:
            return {name: streams[name] for name in self.sends if name in streams}
        tokens = Tokens.of(batch, self.context, cache)
        x_tH = streams["hidden"] if self.embedding is None else self._embedded(streams, batch, tokens)
        x_tH = streams["hidden"] = self.through_layers(x_tH, tokens, memory)
        if isinstance(self.head, HiddenStates):
            return self.head(x_tH, tokens)
        if self.head is None:
            return {name: streams[name] for name in self.sends if name in streams}
        return {"logits": self.head(x_tH if tokens.new is None else x_tH[tokens.new.last])}

    def _embedded(self, streams: Tensors, batch: Batch, tokens: Tokens) -> Tensor:
        """The residual stream x [t, H]."""
        assert self.embedding is not None
        media = {name: streams.pop(f"{name}_tokens") for name in MEDIA if f"{name}_tokens" in streams}
        return self.embedding(batch["ids"], tokens, media) if media else self.embedding(batch["ids"], tokens)

    def _memory(self, streams: Tensors, batch: Batch) -> Memory | None:
        """What decoder layers attend to; `streams` gets the encoder's, if this stage has some of it. None without an
        encoder, and where it has nothing to read."""
        if ("memory" not in streams and self.encoder is None) or not _tokens_of("memory", batch):
            return None
        source = Tokens.of_source(batch, self.context)
        if self.encoder is not None:
            streams["memory"] = self.encoder.read(streams.get("memory"), batch["source"], source)
        return Memory(streams["memory"], source)


def _tokens_of(stream: str, batch: Batch) -> int:
    """In a micro-batch, which may have none: of a medium that its samples lack, or of a source that has been read."""
    counted = batch.get(STREAMS[stream].counted)
    return 0 if counted is None else counted.numel()


def build_stage(config: TrainConfig, context: StageContext) -> TransformerStage:
    """The context's current stage of the configured model. No memory is taken and nothing is communicated."""
    stages = stage_parts(config)
    following = stages[context.stage + 1 : context.stage + 2]
    sends = following[0][0].receives if following else ()
    return TransformerStage(context, config, stages[context.stage], sends)
