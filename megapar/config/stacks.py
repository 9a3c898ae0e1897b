"""The stacks of layers that a model has, each with sizes of its own: pure functions.

| stack     | reads                        | behind it                                           |
|-----------|------------------------------|-----------------------------------------------------|
| `image`   | patches of pixels            | a projector to the trunk's width, `image_tokens`    |
| `audio`   | windows of a waveform        | a projector to the trunk's width, `audio_tokens`    |
| `encoder` | a source's tokens            | a norm; the decoder's layers attend to it, `memory` |
| the trunk | tokens, and what media gave  | the head                                            |

The trunk's name is empty: it is the model itself, a decoder or an encoder.
"""

from dataclasses import dataclass, replace

from megapar.config.model_schema import EncoderConfig, MediumConfig
from megapar.config.schema import ModelConfig, TrainConfig

MEDIA = ("image", "audio")
PLACES = {"image": 2, "audio": 1}  # coordinates of a token: row and column of a patch, or a time
TEXT = "text"  # the modality that the trunk reads itself
TRUNK = ""
STACKS = (TRUNK, "encoder", *MEDIA)  # by number


@dataclass(frozen=True)
class Stream:
    """A tensor [t, width] that crosses boundaries between stages.

    tokens: the stack whose tokens it has; width: the stack whose width it has
    counted: the entry of a batch that has an element for each of its tokens
    """

    tokens: str
    width: str
    counted: str


STREAMS = {
    "hidden": Stream(TRUNK, TRUNK, "ids"),
    "memory": Stream("encoder", "encoder", "source"),
    **{name: Stream(name, name, f"{name}_samples") for name in MEDIA},
    **{f"{name}_tokens": Stream(name, TRUNK, f"{name}_samples") for name in MEDIA},
}


def medium(model: ModelConfig, name: str) -> MediumConfig:
    """The keys `model.image.*` or `model.audio.*`."""
    found: MediumConfig = getattr(model, name)
    return found


def medium_features(model: ModelConfig, name: str) -> int:
    """Numbers that a token of a medium is made of: a patch's pixels, or its frames' mel bands."""
    if name == "image":
        return model.image.channels * model.image.patch**2
    return model.audio.frames * model.audio.mels


def media(model: ModelConfig) -> tuple[str, ...]:
    """Those that the model has an encoder for."""
    return tuple(name for name in MEDIA if medium(model, name).layers)


def stacks(model: ModelConfig) -> tuple[str, ...]:
    """Those of the model, in the order of a forward pass."""
    return (*media(model), *(("encoder",) if model.encoder.layers else ()), TRUNK)


def stack_layers(model: ModelConfig, stack: str) -> int:
    """How many a stack has."""
    layers: int = getattr(model, stack).layers if stack else model.layers
    return layers


def prefix(stack: str) -> str:
    """What the names of a stack's parts and parameters begin with."""
    return f"{stack}." if stack else ""


def stack_model(model: ModelConfig, stack: str) -> ModelConfig:
    """A resolved model with the sizes of one of its stacks."""
    if stack == TRUNK:
        return model
    alone = replace(model, causal=False, window=None, encoder=EncoderConfig())
    if stack == "encoder":
        return replace(alone, layers=model.encoder.layers)
    own = medium(model, stack)
    assert own.hidden and own.heads, "resolve the configuration first"
    # Its embedding says where a patch or a window stands, once.
    return replace(
        alone, layers=own.layers, hidden=own.hidden, heads=own.heads, kv_heads=own.heads, ffn=own.ffn,
        head_dim=own.hidden // own.heads, position="learned", attention_scale=None, attention_softcap=None,
    )  # fmt: skip


def stack_tokens(config: TrainConfig, stack: str) -> int:
    """Tokens of a sample that a stack reads, of media about."""
    train = config.train
    name = {TRUNK: "seq_length", "encoder": "source_length"}.get(stack, f"{stack}_length")
    length: int | None = getattr(train, name)
    assert length is not None, "resolve the configuration first"
    return length


def stack_config(config: TrainConfig, stack: str) -> TrainConfig:
    """A resolved config as one of its model's stacks has it: the stack's sizes, and tokens per sample."""
    if stack == TRUNK:
        return config
    model = stack_model(config.model, stack)
    return replace(config, model=model, train=replace(config.train, seq_length=stack_tokens(config, stack)))
