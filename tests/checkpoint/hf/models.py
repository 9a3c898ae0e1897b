"""Small models of transformers' own, with random weights off their initial values, saved as it saves them."""

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch import Tensor

SIZES: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_BERT = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
_GPT2 = {"vocab_size": 67, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 64, "n_inner": 100}
_GEMMA = SIZES | {"head_dim": 8}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_T5 = {"vocab_size": 67, "d_model": 48, "d_kv": 10, "d_ff": 80, "num_layers": 3, "num_heads": 6}
_T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "decoder_start_token_id": 0}
_WINDOWS = {"sliding_window": 6, "query_pre_attn_scalar": 11}

# name -> (class, config class, its arguments); windows are shorter than the texts
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", SIZES | {"rms_norm_eps": 1e-5}),
    "llama_biases": (
        "LlamaForCausalLM",
        "LlamaConfig",
        SIZES | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 10},
    ),
    "llama_many_kv": ("LlamaForCausalLM", "LlamaConfig", SIZES | {"num_key_value_heads": 6, "rope_theta": 500.0}),
    "llama3": ("LlamaForCausalLM", "LlamaConfig", SIZES | {"rope_theta": 5e5, "rope_scaling": _LLAMA3}),
    "linear": ("LlamaForCausalLM", "LlamaConfig", SIZES | {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    "dynamic": (
        "LlamaForCausalLM",
        "LlamaConfig",
        SIZES | {"max_position_embeddings": 16, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    ),
    "mistral": ("MistralForCausalLM", "MistralConfig", SIZES | {"sliding_window": 7}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", SIZES),
    "qwen2_window": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        SIZES | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", SIZES | {"head_dim": 12, "tie_word_embeddings": True}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", _GEMMA),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", _GEMMA | _WINDOWS),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", _GEMMA | _WINDOWS | {"num_hidden_layers": 7}),
    "gemma3_linear": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        _GEMMA
        | _WINDOWS
        | {
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", SIZES),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", SIZES | {"pad_token_id": 0, "eos_token_id": 1, "sliding_window": 9}),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5 | {"feed_forward_proj": "relu"}),
    "t5_gated": (
        "T5ForConditionalGeneration",
        "T5Config",
        _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_decoder_layers": 2},
    ),
    "bert_masked": ("BertForMaskedLM", "BertConfig", _BERT),
    "bert": ("BertModel", "BertConfig", _BERT),
    "bert_classes": ("BertForSequenceClassification", "BertConfig", _BERT | {"num_labels": 5}),
}
TEXT = 40  # tokens


@dataclass(frozen=True)
class Reference:
    """What transformers computes: logits [B, S, V] (of an encoder hidden states) for ids and a mask [B, S]; with a
    source for an encoder the mask is its own."""

    ids: Tensor
    masks: dict[str, Tensor]
    types: Tensor | None
    source: Tensor | None
    expected: dict[str, Tensor]
    pooled: Tensor | None


def build(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """The model, every parameter off its initial value: transformers starts biases at 0 and norms at 1."""
    import transformers

    kind, config_kind, values = MODELS[name]
    config = getattr(transformers, config_kind)(**(values | changes))
    config._attn_implementation = "eager"
    torch.manual_seed(1)
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)


def save(model: Any, folder: Path, shard: str = "30KB") -> Path:
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


@cache
def reference(name: str) -> Reference:
    model = build(name)
    ids = torch.randint(0, 67, (3, TEXT), generator=torch.Generator().manual_seed(2))
    whole = torch.ones_like(ids)
    right, left = whole.clone(), whole.clone()
    right[0, 25:], right[1, 1:], left[0, :11] = 0, 0, 0
    masks = {"none": whole, "right": right, "left": left}
    types = (torch.arange(TEXT) > 20).long().expand(3, TEXT).contiguous() if name.startswith("bert") else None
    source = torch.randint(0, 67, (3, TEXT), generator=torch.Generator().manual_seed(3)) if name[:2] == "t5" else None
    with torch.no_grad():
        outputs = {side: theirs(model, ids, mask, types, source) for side, mask in masks.items()}
    expected = {side: out["logits"] if "logits" in out else out["last_hidden_state"] for side, out in outputs.items()}
    return Reference(ids, masks, types, source, expected, outputs["right"].get("pooler_output"))


def theirs(model: Any, ids: Tensor, mask: Tensor, types: Tensor | None, source: Tensor | None) -> Any:
    """What a model of transformers returns."""
    if source is not None:
        return model(input_ids=source, attention_mask=mask, decoder_input_ids=ids)
    return model(ids, attention_mask=mask, **({} if types is None else {"token_type_ids": types}))


def distance(found: Tensor, reference: Reference, side: str) -> float:
    """The largest difference of a real token's logits, as a share of the largest logit; of a classifier's scores where
    the first token is real."""
    real, expected = reference.masks[side].bool(), reference.expected[side]
    real = real if reference.source is None else torch.ones_like(real)
    real = real[:, 0] if expected.dim() == 2 else real
    return float((found - expected)[real].abs().max() / expected[real].abs().max())
