"""Llama 2 and 3, Mistral, Qwen2 and Qwen3: pre-norm, RMSNorm, SwiGLU."""

from collections.abc import Mapping
from typing import Any

from megapar.checkpoint.hf.family import Family, Field, Keys
from megapar.checkpoint.hf.fields import (
    GROUPED,
    INIT,
    INV_FREQ,
    PRE,
    SILU,
    SIZES,
    decoder,
    layer_types,
    pattern,
    rope,
    write_rope,
)
from megapar.config.schema import ModelConfig

FIXED = {"norm": "rmsnorm", "position": "rope", "norm_order": "pre"}


def _llama(config: Mapping[str, Any], keys: Keys) -> Keys:
    attention = bool(config.get("attention_bias", False))
    return rope(config) | {"qkv_bias": attention, "attention_out_bias": attention}


def _write_llama(model: ModelConfig) -> Keys:
    return write_rope(model) | {"attention_bias": model.biases["qkv_bias"]}


def _mistral(config: Mapping[str, Any], keys: Keys) -> Keys:
    return rope(config) | {"window": config.get("sliding_window", 4096)}


def _write_mistral(model: ModelConfig) -> Keys:
    return write_rope(model) | {"sliding_window": model.window}


def _window(config: Mapping[str, Any], layers: int) -> Keys:
    """Of Qwen: a window is there, and used if they say so, from a layer on."""
    if not config.get("use_sliding_window", False) or config.get("sliding_window", 4096) is None:
        return {}
    kinds = config.get("layer_types")
    if kinds is None:
        first = config.get("max_window_layers", 28)
        kinds = ["sliding_attention" if layer >= first else "full_attention" for layer in range(layers)]
    if "sliding_attention" not in kinds:
        return {}
    return {"window": config.get("sliding_window", 4096), "window_pattern": pattern(kinds, layers)}


def _write_window(model: ModelConfig) -> Keys:
    if model.window is None:
        return {"use_sliding_window": False}
    return {"use_sliding_window": True, "sliding_window": model.window, "layer_types": layer_types(model)}


def _qwen2(config: Mapping[str, Any], keys: Keys) -> Keys:
    return rope(config) | _window(config, keys["layers"]) | {"qkv_bias": True}


def _qwen3(config: Mapping[str, Any], keys: Keys) -> Keys:
    attention = bool(config.get("attention_bias", False))
    biases = {"qkv_bias": attention, "attention_out_bias": attention}
    return rope(config) | _window(config, keys["layers"]) | biases


def _write_qwen2(model: ModelConfig) -> Keys:
    return write_rope(model) | _write_window(model)


def _write_qwen3(model: ModelConfig) -> Keys:
    return write_rope(model) | _write_window(model) | {"attention_bias": model.biases["qkv_bias"]}


def _family(model_type: str, architecture: str, **facts: Any) -> Family:
    own = facts.pop("fields", ())
    return Family(
        model_type,
        architecture,
        decoder(PRE),
        (*SIZES, *GROUPED, INIT, SILU, Field("rms_norm_eps", "norm_eps", 1e-6), *own),
        fixed=FIXED | facts.pop("fixed", {}),
        ignored=INV_FREQ,
        **facts,
    )


def kv_heads(default: int) -> Field:
    return Field("num_key_value_heads", "kv_heads", default)


UNTIED = Field("tie_word_embeddings", "tied", False)
FAMILIES = (
    _family(
        "llama",
        "LlamaForCausalLM",
        fields=(UNTIED, Field("mlp_bias", "bias", False)),
        must={"pretraining_tp": (1, None)},
        read=_llama,
        write=_write_llama,
    ),
    _family(
        "mistral",
        "MistralForCausalLM",
        fields=(UNTIED, kv_heads(8)),
        read=_mistral,
        write=_write_mistral,
        default_length=131072,
    ),
    _family(
        "qwen2",
        "Qwen2ForCausalLM",
        fields=(UNTIED, kv_heads(32)),
        read=_qwen2,
        write=_write_qwen2,
        default_length=32768,
    ),
    _family(
        "qwen3",
        "Qwen3ForCausalLM",
        fields=(UNTIED, kv_heads(32), Field("head_dim", "head_dim", 128)),
        fixed={"qk_norm": "head"},
        read=_qwen3,
        write=_write_qwen3,
        default_length=32768,
    ),
)
