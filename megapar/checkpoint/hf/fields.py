"""Keys of config.json that several families share."""

from collections.abc import Mapping
from typing import Any

from megapar.checkpoint.hf.family import Field, Keys, Stored, linear
from megapar.config.errors import UserError
from megapar.config.schema import ModelConfig

SIZES = (
    Field("vocab_size", "vocab_size", needed=True),
    Field("hidden_size", "hidden", needed=True),
    Field("intermediate_size", "ffn", needed=True),
    Field("num_hidden_layers", "layers", needed=True),
    Field("num_attention_heads", "heads", needed=True),
)
SILU = Field("hidden_act", "activation", "silu", {"swiglu": ("silu", "swish")})
INV_FREQ = (r".*\.rotary_emb\.inv_freq",)  # tensors of older files that follow from config.json
INIT = Field("initializer_range", "init_std", 0.02)
GROUPED = (Field("num_key_value_heads", "kv_heads"), Field("head_dim", "head_dim"))
ROPE_KINDS = {"none": "default", "linear": "linear", "dynamic": "dynamic", "llama3": "llama3"}
FULL, WINDOWED = "full_attention", "sliding_attention"


def decoder(norms: Mapping[str, str]) -> tuple[Stored, ...]:
    """The tensors of Llama and of those named after it. norms: a layer's, by their names on disk."""
    theirs, ours = "model.layers.{}", "layers.{}"
    linears = {
        **{f"self_attn.{one}_proj": f"attention.{one}" for one in "qkv"},
        "self_attn.o_proj": "attention.out",
        **{f"mlp.{one}_proj": f"mlp.{one}" for one in ("gate", "up", "down")},
    }
    heads = {f"self_attn.{one}_norm": f"attention.{one}_norm" for one in "qk"}
    return (
        Stored("model.embed_tokens.weight", ("embedding.weight",)),
        *(one for disk, name in linears.items() for one in linear(f"{theirs}.{disk}", f"{ours}.{name}")),
        *(
            Stored(f"{theirs}.{disk}.weight", (f"{ours}.{name}.weight",))
            for disk, name in (heads | dict(norms)).items()
        ),
        Stored("model.norm.weight", ("norm.weight",)),
        Stored("lm_head.weight", ("head.weight",)),
    )


PRE = {"input_layernorm": "norm1", "post_attention_layernorm": "norm2"}


def rope(config: Mapping[str, Any], default_theta: float = 10000.0) -> Keys:
    """rope_theta and rope_scaling, as transformers 5 writes them (rope_parameters) and as earlier ones do, which come
    first where both are there."""
    parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if FULL in parameters or WINDOWED in parameters:
        if WINDOWED in parameters and parameters[WINDOWED] != parameters.get(FULL):
            raise UserError("rope_parameters differ between kinds of layers, which this model_type does not have")
        parameters = parameters[FULL]
    theta = parameters.get("rope_theta", config.get("rope_theta", default_theta))
    return {"rope_theta": float(theta), "rope_scaling": scaling(config, parameters)}


def scaling(config: Mapping[str, Any], parameters: Mapping[str, Any]) -> Keys:
    """rope_scaling of one set of parameters."""
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    partial = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1.0):
        raise UserError(f"partial_rotary_factor={partial} is not supported; all channels turn here")
    ours = {theirs: name for name, theirs in ROPE_KINDS.items()}
    if kind not in ours:
        raise UserError(f"rope_type={kind!r} is not supported; there are {', '.join(ours)}")
    if ours[kind] == "none":
        return {"kind": "none"}
    found = {"kind": ours[kind], "factor": float(parameters["factor"])}
    if kind == "dynamic":
        return found | {"original_length": config["max_position_embeddings"]}
    if kind == "llama3":
        names = {"low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor"}
        found |= {name: float(parameters[theirs]) for name, theirs in names.items()}
        length = "original_max_position_embeddings"  # beside rope_scaling it comes first
        found["original_length"] = config.get(length) or parameters.get(length) or config["max_position_embeddings"]
    return found


def write_rope(model: ModelConfig) -> Keys:
    """The same as earlier versions write it, which all read."""
    return {"rope_theta": model.rope_theta} | write_scaling(model)


def write_scaling(model: ModelConfig) -> Keys:
    own = model.rope_scaling
    if own.kind == "none":
        return {}
    found: Keys = {"rope_type": ROPE_KINDS[own.kind], "factor": own.factor}
    if own.kind == "llama3":
        found |= {"low_freq_factor": own.low_freq_factor, "high_freq_factor": own.high_freq_factor}
        found["original_max_position_embeddings"] = own.original_length
    return {"rope_scaling": found}


def pattern(layer_types: list[str], layers: int) -> str:
    """The shortest `window_pattern` of these kinds of layers. Raises UserError for another kind, or another number."""
    letters = {WINDOWED: "W", FULL: "F"}
    if len(layer_types) != layers:
        raise UserError(f"layer_types has {len(layer_types)} kinds for {layers} layers")
    if others := sorted(set(layer_types) - letters.keys()):
        raise UserError(f"layer_types has {others[0]}, which is not supported; there are {', '.join(letters)}")
    whole = "".join(letters[kind] for kind in layer_types)
    lengths = range(1, len(whole) + 1)
    return next(whole[:n] for n in lengths if (whole[:n] * len(whole))[: len(whole)] == whole)


def layer_types(model: ModelConfig) -> list[str]:
    return [WINDOWED if model.windowed(layer) else FULL for layer in range(model.layers)]
