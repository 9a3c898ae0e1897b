"""Gemma 1 to 3 (text): scaled embeddings, RMSNorm by 1 + weight, GEGLU; from 2 on norms on both sides and windows."""

from collections.abc import Mapping
from math import sqrt
from typing import Any

from megapar.checkpoint.hf.family import Family, Field, Keys
from megapar.checkpoint.hf.fields import (
    FULL,
    INIT,
    PRE,
    SIZES,
    WINDOWED,
    decoder,
    layer_types,
    pattern,
    rope,
    scaling,
    write_rope,
)
from megapar.config.errors import UserError
from megapar.config.schema import ModelConfig

SANDWICH = {
    "input_layernorm": "norm1",
    "post_attention_layernorm": "norm1_out",
    "pre_feedforward_layernorm": "norm2",
    "post_feedforward_layernorm": "norm2_out",
}
FIXED = {"norm": "rmsnorm", "norm_offset": True, "position": "rope", "bias": False}
TANH = {"geglu": ("gelu_pytorch_tanh", "gelu_new")}

LOOSE = {"geglu": (*TANH["geglu"], "gelu")}  # what the first releases said, and meant the form with a tanh


def _sizes(heads: int, kv_heads: int) -> tuple[Field, ...]:
    grouped = (Field("num_key_value_heads", "kv_heads", kv_heads), Field("head_dim", "head_dim", 256))
    return (*SIZES[:-1], Field("num_attention_heads", "heads", heads), *grouped, INIT)


SHARED = (Field("rms_norm_eps", "norm_eps", 1e-6), Field("tie_word_embeddings", "tied", True))
NO_BIAS = {"attention_bias": False, "use_bidirectional_attention": (False, None)}


def _scale(keys: Keys) -> Keys:
    return {"embedding_scale": sqrt(keys["hidden"])}


def _gemma(config: Mapping[str, Any], keys: Keys) -> Keys:
    return rope(config) | _scale(keys)


def _windows(config: Mapping[str, Any], keys: Keys, every: int) -> Keys:
    """Scores' scale, softcaps and windows. every: of so many layers the last one sees all."""
    kinds = config.get("layer_types")
    if kinds is None:
        kinds = [WINDOWED if (layer + 1) % every else FULL for layer in range(keys["layers"])]
    windowed = {"window": config.get("sliding_window", 4096), "window_pattern": pattern(kinds, keys["layers"])}
    found = _scale(keys) | {"attention_scale": config.get("query_pre_attn_scalar", 256) ** -0.5}
    return found | (windowed if WINDOWED in kinds else {})


def _write_windows(model: ModelConfig) -> Keys:
    assert model.head_dim is not None
    scale = model.attention_scale or model.head_dim**-0.5
    scalar = scale**-2
    return {
        "query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-6 * scalar else scalar,
        "sliding_window": model.window or 4096,
        "layer_types": layer_types(model),
    }


def _gemma2(config: Mapping[str, Any], keys: Keys) -> Keys:
    return rope(config) | _windows(config, keys, 2)


def _write_gemma2(model: ModelConfig) -> Keys:
    return write_rope(model) | _write_windows(model)


def _gemma3(config: Mapping[str, Any], keys: Keys) -> Keys:
    parameters = config.get("rope_parameters")
    if parameters is None:
        parameters = {FULL: config.get("rope_scaling") or {}, WINDOWED: {}}
    full, windowed = parameters.get(FULL) or {}, parameters.get(WINDOWED) or {}
    if windowed.get("rope_type", "default") != "default":
        raise UserError(f"rope_type={windowed['rope_type']!r} of layers with a window is not supported; use default")
    found = {
        "rope_theta": float(full.get("rope_theta", config.get("rope_theta", 1e6))),
        "rope_scaling": scaling(config, full),
    }
    found |= _windows(config, keys, config.get("sliding_window_pattern") or 6)
    if "window" in found:
        found["window_rope_theta"] = float(windowed.get("rope_theta", config.get("rope_local_base_freq", 1e4)))
    return found


def _write_gemma3(model: ModelConfig) -> Keys:
    return _write_gemma2(model) | {"rope_local_base_freq": model.window_rope_theta or model.rope_theta}


FAMILIES = (
    Family(
        "gemma",
        "GemmaForCausalLM",
        decoder(PRE),
        (
            *_sizes(16, 16),
            Field("hidden_act", "activation", "gelu_pytorch_tanh", LOOSE),
            *SHARED,
        ),
        fixed=FIXED,
        must=NO_BIAS | {"hidden_activation": (*TANH["geglu"], None)},
        read=_gemma,
        write=write_rope,
        default_length=8192,
    ),
    Family(
        "gemma2",
        "Gemma2ForCausalLM",
        decoder(SANDWICH),
        (
            *_sizes(8, 4),
            Field("hidden_activation", "activation", "gelu_pytorch_tanh", TANH),
            Field("attn_logit_softcapping", "attention_softcap", 50.0),
            Field("final_logit_softcapping", "logit_softcap", 30.0),
            *SHARED,
        ),
        fixed=FIXED | {"norm_order": "sandwich"},
        must=NO_BIAS,
        read=_gemma2,
        write=_write_gemma2,
        default_length=8192,
    ),
    Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        decoder(SANDWICH),
        (
            *_sizes(8, 4),
            Field("hidden_activation", "activation", "gelu_pytorch_tanh", TANH),
            Field("final_logit_softcapping", "logit_softcap"),
            *SHARED,
        ),
        fixed=FIXED | {"norm_order": "sandwich", "qk_norm": "head"},
        must=NO_BIAS | {"attn_logit_softcapping": None},  # transformers reads it nowhere
        read=_gemma3,
        write=_write_gemma3,
        default_length=131072,
    ),
)
