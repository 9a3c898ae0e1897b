"""Switches of the families' models, for sizes of a test's own."""

from typing import Any

LLAMA3 = {"kind": "llama3", "factor": 4.0, "original_length": 8, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_SANDWICH = {"model.norm_order": "sandwich", "model.norm_offset": True, "model.activation": "geglu"}

FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {"model.window": 5},
    "qwen2": {"model.qkv_bias": True, "model.window": 4, "model.window_pattern": "FFWW"},
    "qwen3": {"model.qk_norm": "head", "model.tied": True},
    "gemma2": _SANDWICH
    | {
        "model.window": 4,
        "model.window_pattern": "WF",
        "model.attention_softcap": 2.0,
        "model.logit_softcap": 0.5,
        "model.embedding_scale": 4.9,
        "model.attention_scale": 0.8,
        "model.tied": True,
    },
    "gemma3": _SANDWICH
    | {
        "model.window": 3,
        "model.window_pattern": "WWF",
        "model.window_rope_theta": 100.0,
        "model.qk_norm": "head",
        "model.embedding_scale": 4.9,
    },
    "olmo2": {"model.norm_order": "output", "model.qk_norm": "all"},
    "bert": {
        "model.norm": "layernorm",
        "model.norm_order": "post",
        "model.position": "learned",
        "model.activation": "gelu_erf",
        "model.bias": True,
        "model.causal": False,
        "model.embedding_norm": True,
        "model.token_types": 2,
        "model.output": "mlm",
        "model.output_bias": True,
        "model.tied": True,
    },
}
