"""Phi-3: Llama's arithmetic, with q, k and v one matrix on disk, and gate and up another."""

from collections.abc import Mapping
from typing import Any

from megapar.checkpoint.hf.family import Family, Field, Keys, Stored, linear
from megapar.checkpoint.hf.fields import GROUPED, INIT, INV_FREQ, PRE, SILU, SIZES, decoder, rope, write_rope
from megapar.config.schema import ModelConfig

SPLIT = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_layer = "model.layers.{}"
_fused: tuple[Stored, ...] = (
    *linear(f"{_layer}.self_attn.qkv_proj", *(f"layers.{{}}.attention.{one}" for one in "qkv")),
    *linear(f"{_layer}.mlp.gate_up_proj", "layers.{}.mlp.gate", "layers.{}.mlp.up"),
)


def _read(config: Mapping[str, Any], keys: Keys) -> Keys:
    return rope(config) | {"window": config.get("sliding_window")}


def _write(model: ModelConfig) -> Keys:
    return write_rope(model) | {"sliding_window": model.window}


FAMILIES = (
    Family(
        "phi3",
        "Phi3ForCausalLM",
        (*_fused, *(one for one in decoder(PRE) if one.disk.split(".")[-2] not in SPLIT)),
        (
            *SIZES,
            *GROUPED[:1],
            INIT,
            SILU,
            Field("rms_norm_eps", "norm_eps", 1e-5),
            Field("tie_word_embeddings", "tied", False),
        ),
        fixed={"norm": "rmsnorm", "position": "rope"},
        must={"attention_bias": False},
        read=_read,
        write=_write,
        default_length=4096,
        ignored=INV_FREQ,
    ),
)
