"""The keys `model.*`: what a Transformer of one stack of layers is made of. conf/model/ has families and sizes."""

from dataclasses import dataclass
from typing import Literal

from megapar.config.keys import group, option


@dataclass(frozen=True)
class RopeScalingConfig:
    """Rotary frequencies for longer texts than a model was first trained on."""

    kind: Literal["none", "linear", "dynamic", "llama3"] = option(
        "none",
        "linear: positions divided by factor; dynamic: a base that grows with the text (NTK); llama3: low frequencies",
        fixed=True,
    )
    factor: float = option(1.0, "how many times longer", at_least=1, fixed=True)
    original_length: int | None = option(
        None, "positions that the model was first trained on (dynamic, llama3)", at_least=1, fixed=True
    )
    low_freq_factor: float = option(
        1.0, "llama3: longer waves than original_length / this are scaled in full", above=0, fixed=True
    )
    high_freq_factor: float = option(
        4.0, "llama3: shorter waves than original_length / this are left alone", above=0, fixed=True
    )


MATRICES = ("q", "k", "v", "out", "gate", "up", "down")  # of a layer; without a gate there is none


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters beside frozen matrices (Hu et al. 2021): W x + alpha / rank * B A x."""

    rank: int = option(0, "rank of the adapters, which alone are trained; 0: none", at_least=0, fixed=True)
    alpha: float = option(16.0, "what adapters are multiplied by, times rank", above=0, fixed=True)
    targets: list[str] | None = option(
        None, "matrices of layers that have one, of q, k, v, out, gate, up and down; default: all", fixed=True
    )
    base: str | None = option(
        None,
        "checkpoint of the frozen weights; default: checkpoint.weights, or else initial values",
        verbatim=True,
        path=True,
        identity=False,
    )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def adapts(self, name: str) -> bool:
        """Whether the matrix with this name in its layer has an adapter."""
        return self.rank > 0 and name in (MATRICES if self.targets is None else self.targets)


@dataclass(frozen=True)
class EncoderConfig:
    """An encoder beside a decoder, whose layers attend to its output. Of its sizes it has the model's."""

    layers: int = option(
        0, "Transformer layers of an encoder in front of the decoder; 0: there is none", at_least=0, fixed=True
    )
    shared: bool = option(True, "encoder and decoder share the table of token embeddings", fixed=True)
    start: int = option(0, "token that a target begins with (decoder_start_token_id)", at_least=0, fixed=True)


@dataclass(frozen=True)
class MediumConfig:
    """An encoder of a medium, whose output takes places among the tokens of the model. Its layers are the model's in
    kind, without an order of tokens, and of sizes of their own."""

    layers: int = option(0, "Transformer layers of its encoder; 0: there is none", at_least=0, fixed=True)
    hidden: int | None = option(None, "width of its encoder; default: the model's", at_least=1, fixed=True)
    heads: int | None = option(None, "heads of its encoder; default: the model's", at_least=1, fixed=True)
    ffn: int | None = option(
        None, "inner width of its encoder's MLP; default: of its hidden width, as the model's", at_least=1, fixed=True
    )


@dataclass(frozen=True)
class ImageConfig(MediumConfig):
    """An encoder of images (Dosovitskiy et al. 2020): every patch of pixels is a token."""

    patch: int = option(
        16, "height and width of a patch in pixels; those of an image are multiples", at_least=1, fixed=True
    )
    channels: int = option(3, "1: grey values; 3: red, green and blue", at_least=1, at_most=3, fixed=True)


@dataclass(frozen=True)
class AudioConfig(MediumConfig):
    """An encoder of sound: log-mel features, computed inside the model, of some frames each are a token."""

    rate: int = option(16000, "sampling rate in Hz", at_least=1000, fixed=True)
    mels: int = option(80, "mel bands of a frame", at_least=1, fixed=True)
    window_ms: float = option(25.0, "length of a frame in milliseconds", above=0, fixed=True)
    hop_ms: float = option(10.0, "milliseconds from one frame to the next", above=0, fixed=True)
    frames: int = option(4, "frames of a token", at_least=1, fixed=True)

    @property
    def window(self) -> int:
        """Samples of a frame."""
        return round(self.rate * self.window_ms / 1000)

    @property
    def hop(self) -> int:
        """Samples from one frame to the next."""
        return round(self.rate * self.hop_ms / 1000)

    @property
    def samples(self) -> int:
        """That a token reads; of those that the next reads too, if frames overlap."""
        return (self.frames - 1) * self.hop + self.window

    def tokens(self, samples: int) -> int:
        """Of a sound of so many samples: its last token may reach beyond its end."""
        return max(1, -(-samples // (self.frames * self.hop)))


@dataclass(frozen=True)
class ModelConfig:
    """A Transformer of a family by its switches: a decoder or an encoder, or both with model.encoder.layers."""

    layers: int = option(
        4, "number of Transformer layers", at_least=1, fixed=True, also=("num_layers", "num_hidden_layers", "n_layer")
    )
    hidden: int = option(
        128, "width of the residual stream", at_least=1, fixed=True, also=("hidden_size", "d_model", "n_embd")
    )
    heads: int = option(4, "query heads", at_least=1, fixed=True, also=("num_heads", "num_attention_heads", "n_head"))
    kv_heads: int | None = option(
        None,
        "key/value heads (grouped-query attention); default: heads",
        at_least=1,
        fixed=True,
        also=("num_key_value_heads", "num_query_groups"),
    )
    head_dim: int | None = option(None, "channels of a head; default: hidden / heads", at_least=1, fixed=True)
    ffn: int | None = option(
        None,
        "inner width of the MLP; default: 4*hidden; gated: 8/3*hidden rounded up to 32",
        at_least=1,
        fixed=True,
        also=("ffn_hidden_size", "intermediate_size"),
    )
    vocab_size: int | None = option(
        None, "rows of the embedding; default: the tokenizer's size, never smaller", at_least=1, fixed=True
    )
    norm: Literal["rmsnorm", "layernorm"] = option(
        "rmsnorm", "normalisation before attention, MLP and head", fixed=True
    )
    norm_order: Literal["pre", "post", "output", "sandwich"] = option(
        "pre",
        "norms of what attention and MLP read, of the sums behind them (post), of their outputs, or of both (sandwich)",
        fixed=True,
    )
    norm_offset: bool = option(False, "RMSNorm multiplies by 1 + weight (Gemma)", fixed=True)
    norm_eps: float = option(1e-5, "epsilon inside the normalisation", above=0, fixed=True)
    position: Literal["rope", "learned", "relative"] = option(
        "rope",
        "rotary embedding of q and k; a learned table added once; or learned biases of scores by distance (T5)",
        fixed=True,
    )
    relative_buckets: int = option(32, "position=relative: how many biases a head has", at_least=4, fixed=True)
    relative_distance: int = option(
        128, "position=relative: tokens that are this far apart, or further, have one bias", at_least=2, fixed=True
    )
    rope_theta: float = option(10000.0, "base of the rotary frequencies", above=0, fixed=True)
    rope_scaling: RopeScalingConfig = group(RopeScalingConfig, "rotary frequencies of longer texts")
    causal: bool = option(True, "a token sees only itself and those before it; false: an encoder", fixed=True)
    window: int | None = option(
        None, "tokens that a token sees, itself included, in layers with a window; default: all", at_least=1, fixed=True
    )
    window_pattern: str = option(
        "W", "which layers have the window: W, or F for those that see all, repeated: WWWWWF", fixed=True
    )
    window_rope_theta: float | None = option(
        None,
        "rope_theta of layers with a window, never scaled; default: as the others",
        above=0,
        fixed=True,
    )
    qk_norm: Literal["none", "head", "all"] = option(
        "none", "RMSNorm of q and k before they turn: of every head, or of all heads together", fixed=True
    )
    attention_scale: float | None = option(
        None, "what scores are multiplied by; default: 1/sqrt(head_dim)", above=0, fixed=True
    )
    attention_softcap: float | None = option(
        None, "scores become softcap * tanh(scores / softcap); default: as they are", above=0, fixed=True
    )
    activation: Literal["swiglu", "geglu", "gelu", "gelu_erf", "relu"] = option(
        "swiglu", "MLP nonlinearity; the first two have a gate; gelu is the form with a tanh", fixed=True
    )
    bias: bool = option(False, "biases in the linear layers of attention and MLP", fixed=True)
    qkv_bias: bool | None = option(None, "biases of q, k and v; default: bias", fixed=True)
    attention_out_bias: bool | None = option(None, "bias of attention's output; default: bias", fixed=True)
    tied: bool = option(False, "the output head shares the embedding's weight", fixed=True, head=True)
    embedding_scale: float = option(1.0, "what token embeddings are multiplied by", above=0, fixed=True)
    embedding_norm: bool = option(False, "a norm behind the embedding (BERT)", fixed=True)
    token_types: int = option(0, "rows of a table of token types, added to the embedding", at_least=0, fixed=True)
    output: Literal["lm", "mlm", "hidden", "classes"] = option(
        "lm",
        "last part: logits; mlm: those behind a dense layer and a norm (BERT); the hidden states; or scores of classes",
        fixed=True,
        head=True,
    )
    output_bias: bool = option(False, "a bias of every logit", fixed=True, head=True)
    logit_scale: float = option(1.0, "what logits are multiplied by", above=0, fixed=True, head=True)
    logit_softcap: float | None = option(
        None, "logits become softcap * tanh(logits / softcap); default: as they are", above=0, fixed=True, head=True
    )
    classes: int | None = option(
        None,
        "with output=classes: how many; default: as many as the data have labels",
        at_least=1,
        fixed=True,
        head=True,
    )
    pooling: Literal["first", "last", "mean"] | None = option(
        None, "the hidden state that stands for a text; default: of its first token, causal: of its last", fixed=True,
        head=True,
    )  # fmt: skip
    pooler: bool = option(
        False, "with output=hidden or classes: tanh of a dense layer of what stands for a text", fixed=True, head=True
    )
    dropout: float = option(
        0.0, "dropout of hidden states (embedding, attention output, MLP output)", at_least=0, below=1, kept=True
    )
    attention_dropout: float = option(0.0, "not supported: must be 0", kept=True)
    init_std: float = option(
        0.02,
        "std of initial weights; residual projections get init_std / sqrt(2*layers)",
        above=0,
        at_most=1000,
        kept=True,
    )

    encoder: EncoderConfig = group(EncoderConfig, "an encoder in front of the decoder")
    image: ImageConfig = group(ImageConfig, "an encoder of images")
    audio: AudioConfig = group(AudioConfig, "an encoder of sound")
    lora: LoraConfig = group(LoraConfig, "low-rank adapters")
    module: str | None = option(
        None,
        "PACKAGE:FUNCTION that builds a stage from (config, context), importable from here; default: the Transformer",
        verbatim=True,
        fixed=True,
    )

    @property
    def pools(self) -> Literal["first", "last", "mean"]:
        """`pooling`, which follows `causal` where nothing is said."""
        return self.pooling or ("last" if self.causal else "first")

    @property
    def has_logits(self) -> bool:
        """Whether the last part gives scores of tokens."""
        return self.output in ("lm", "mlm")

    @property
    def all_layers(self) -> int:
        """Of all its stacks."""
        return self.image.layers + self.audio.layers + self.encoder.layers + self.layers

    @property
    def has_media(self) -> bool:
        """Whether it reads images or sound."""
        return self.image.layers + self.audio.layers > 0

    @property
    def shares_embedding(self) -> bool:
        """Whether the decoder's table of token embeddings is also another part's."""
        return self.tied or (self.encoder.layers > 0 and self.encoder.shared)

    @property
    def gated(self) -> bool:
        """Whether the MLP has a third matrix, the gate's."""
        return self.activation in ("swiglu", "geglu")

    @property
    def biases(self) -> dict[str, bool]:
        """`qkv_bias` and `attention_out_bias`, which follow `bias` where nothing is said."""
        said = {"qkv_bias": self.qkv_bias, "attention_out_bias": self.attention_out_bias}
        return {name: self.bias if value is None else value for name, value in said.items()}

    def windowed(self, layer: int) -> bool:
        """Whether tokens of a layer see only a window."""
        return self.window is not None and self.window_pattern[layer % len(self.window_pattern)] == "W"
