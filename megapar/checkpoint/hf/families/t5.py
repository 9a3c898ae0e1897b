"""T5 (Raffel et al. 2020): encoder and decoder with biases by distance, RMSNorm, and scores that are not scaled."""

from collections.abc import Mapping
from typing import Any

from megapar.checkpoint.hf.family import Family, Field, Keys, Stored
from megapar.config.schema import ModelConfig

_ATTENTION = {"q": "q", "k": "k", "v": "v", "o": "out"}
_NORMS = {"attention": "norm1", "cross": "cross_norm", "mlp": "norm2"}
_ACTIVATIONS = {
    "relu": "relu",
    "geglu": "gated-gelu",
    "swiglu": "gated-silu",
    "gelu": ("gelu_new", "gelu_pytorch_tanh"),
    "gelu_erf": "gelu",
}


def _stack(disk: str, ours: str, steps: Mapping[str, str]) -> list[Stored]:
    """Tensors of an encoder or a decoder. steps: what a layer does, our names by theirs, the MLP last."""
    found = [
        Stored(f"{disk}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (f"{ours}relative.weight",)),
        Stored(f"{disk}.final_layer_norm.weight", (f"{ours}norm.weight",)),
    ]
    for number, (theirs, step) in enumerate(steps.items()):
        layer, own = f"{disk}.block.{{}}.layer.{number}", f"{ours}layers.{{}}"
        found.append(Stored(f"{layer}.layer_norm.weight", (f"{own}.{_NORMS[step]}.weight",)))
        for one, name in ({"wo": "down"} if step == "mlp" else _ATTENTION).items():
            found.append(Stored(f"{layer}.{theirs}.{one}.weight", (f"{own}.{step}.{name}.weight",)))
        if step == "mlp":
            found += [
                Stored(f"{layer}.{theirs}.wi.weight", (f"{own}.mlp.up.weight",), gated=False),
                Stored(f"{layer}.{theirs}.wi_0.weight", (f"{own}.mlp.gate.weight",), gated=True),
                Stored(f"{layer}.{theirs}.wi_1.weight", (f"{own}.mlp.up.weight",), gated=True),
            ]
    return found


def _read(config: Mapping[str, Any], keys: Keys) -> Keys:
    layers = config.get("num_decoder_layers")
    layers = config["num_layers"] if layers is None else layers
    start = config.get("decoder_start_token_id")
    start = config.get("pad_token_id") if start is None else start
    # Only the first models scale; files of before transformers 5 say it by their tie.
    scales = config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True) is not False)
    found: Keys = {"layers": layers, "encoder": {"layers": config["num_layers"], "start": start or 0}}
    return found | {"logit_scale": keys["hidden"] ** -0.5 if scales else 1.0}


def _write(model: ModelConfig) -> Keys:
    return {
        "num_layers": model.encoder.layers,
        "num_decoder_layers": model.layers,
        "decoder_start_token_id": model.encoder.start,
        "pad_token_id": model.encoder.start,
        "scale_decoder_outputs": model.logit_scale != 1.0,
        "is_encoder_decoder": True,
    }


FAMILIES = (
    Family(
        "t5",
        "T5ForConditionalGeneration",
        (
            Stored("shared.weight", ("embedding.weight",)),
            *_stack("encoder", "encoder.", {"SelfAttention": "attention", "DenseReluDense": "mlp"}),
            *_stack("decoder", "", {"SelfAttention": "attention", "EncDecAttention": "cross", "DenseReluDense": "mlp"}),
            Stored("lm_head.weight", ("head.weight",)),
        ),
        (
            Field("vocab_size", "vocab_size", needed=True),
            Field("d_model", "hidden", needed=True),
            Field("d_ff", "ffn", needed=True),
            Field("d_kv", "head_dim", needed=True),
            Field("num_heads", "heads", needed=True),
            Field("layer_norm_epsilon", "norm_eps", 1e-6),
            Field("relative_attention_num_buckets", "relative_buckets", 32),
            Field("relative_attention_max_distance", "relative_distance", 128),
            Field("feed_forward_proj", "activation", "relu", _ACTIVATIONS),
            Field("tie_word_embeddings", "tied", True),
        ),
        fixed={"position": "relative", "attention_scale": 1.0},
        read=_read,
        write=_write,
        length="n_positions",
        default_length=512,
        ignored=(
            r"(encoder|decoder)\.embed_tokens\.weight",
            r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",  # of old files, not read
        ),
        untied_by="lm_head.weight",
    ),
)
