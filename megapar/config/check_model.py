"""Refusals of a model that no layout can run. Each raises ConfigError, one line with the key, its value and the
remedy."""

from dataclasses import fields
from operator import attrgetter

from megapar.config.errors import ConfigError, show
from megapar.config.model_schema import LoraConfig
from megapar.config.policy import layer_linears
from megapar.config.schema import ModelConfig
from megapar.config.stacks import MEDIA, PLACES, media, medium


def check_model(model: ModelConfig) -> None:
    """Refuse a model that no layout can run."""
    if model.kv_heads is not None and model.heads % model.kv_heads:
        problem = f"model.heads={model.heads} is not a multiple of it; use {divisors(model.heads)}"
        raise ConfigError("model.kv_heads", model.kv_heads, problem)
    check_encoder(model)
    check_media(model)
    if model.position == "rope" and model.head_dim is not None and model.head_dim % 2:
        raise ConfigError(
            "model.head_dim", model.head_dim, "rotary embedding needs it even; or use model.position=learned"
        )
    if model.qk_norm == "all" and model.norm_offset:
        raise ConfigError("model.norm_offset", True, "qk_norm=all has no such norm; use qk_norm=head")
    if model.norm_offset and model.norm == "layernorm":
        raise ConfigError("model.norm_offset", True, "LayerNorm has no offset; use model.norm=rmsnorm")
    if not model.window_pattern or set(model.window_pattern) - set("WF"):
        raise ConfigError("model.window_pattern", model.window_pattern, "use letters W (window) and F (full), as WWF")
    if model.window is not None and not model.causal:
        raise ConfigError("model.window", model.window, "looks back alone; use it with model.causal=true")
    scaling = model.rope_scaling
    if scaling.kind in ("dynamic", "llama3") and scaling.original_length is None:
        key = "model.rope_scaling.original_length"
        raise ConfigError(key, None, f"{scaling.kind} needs the positions that the model was first trained on")
    if scaling.kind == "llama3" and scaling.low_freq_factor >= scaling.high_freq_factor:
        key = "model.rope_scaling.low_freq_factor"
        raise ConfigError(key, scaling.low_freq_factor, f"use less than high_freq_factor={scaling.high_freq_factor}")
    if scaling.kind == "dynamic" and model.head_dim == 2:
        raise ConfigError("model.head_dim", 2, "dynamic rope scaling needs more channels")
    linears = layer_linears(model) if model.ffn else {}
    there = [output.name for linear in linears.values() for output in linear.outputs]
    for name in model.lora.targets or []:
        if there and name not in there:
            raise ConfigError("model.lora.targets", name, f"no such matrix in a layer; there are {', '.join(there)}")
    check_lora(model.lora)
    if not model.has_logits:
        if model.output == "classes" and model.causal and model.pooling == "first":
            problem = "in a decoder the first token sees itself alone; use last or mean"
            raise ConfigError("model.pooling", "first", problem)
        for key, none in (("tied", False), ("output_bias", False), ("logit_softcap", None), ("logit_scale", 1.0)):
            if (value := getattr(model, key)) != none:
                problem = f"model.output={model.output} has no logits; give model.{key}={show(none)}"
                raise ConfigError(f"model.{key}", value, problem)
    else:
        for key, none in (("pooler", False), ("classes", None)):
            if (value := getattr(model, key)) != none:
                problem = f"model.output={model.output} has none; give model.{key}={show(none)}"
                raise ConfigError(f"model.{key}", value, problem)
    if model.attention_dropout:
        raise ConfigError("model.attention_dropout", model.attention_dropout, "not supported; use model.dropout")


def check_lora(lora: LoraConfig) -> None:
    """Refuse adapters of nothing, and their keys where there are none."""
    if lora.targets == []:
        raise ConfigError("model.lora.targets", [], "nothing would be trained; name matrices, or leave it out for all")
    if lora.targets is not None and (twice := [name for name in lora.targets if lora.targets.count(name) > 1]):
        raise ConfigError("model.lora.targets", lora.targets, f"has {twice[0]} twice; name each matrix once")
    for key, default in (("alpha", LoraConfig().alpha), ("targets", None), ("base", None)):
        if lora.rank == 0 and (value := getattr(lora, key)) != default:
            problem = "has no effect here; it is used only with model.lora.rank above 0"
            raise ConfigError(f"model.lora.{key}", value, problem)


def check_encoder(model: ModelConfig) -> None:
    """Refuse what an encoder-decoder can't be, its keys without an encoder, and those of biases by distance without
    these."""
    if model.position == "relative":
        exact = model.relative_buckets // (2 if model.causal and not model.encoder.layers else 4)
        if model.relative_buckets % 4:
            problem = "half of them are for either side, and half of those for single distances; use a multiple of 4"
            raise ConfigError("model.relative_buckets", model.relative_buckets, problem)
        if model.relative_distance <= exact:
            problem = f"distances up to {exact} have biases of their own; use more than that, or fewer buckets"
            raise ConfigError("model.relative_distance", model.relative_distance, problem)
        if model.attention_softcap is not None:
            problem = "scores with biases have none; leave it out, or use another model.position"
            raise ConfigError("model.attention_softcap", model.attention_softcap, problem)
    encoder = model.encoder
    if not encoder.layers:
        for key, none in (("shared", True), ("start", 0)):
            if (value := getattr(encoder, key)) != none:
                raise ConfigError(f"model.encoder.{key}", value, "has no effect without model.encoder.layers")
        return
    for key, needed in (("causal", True), ("output", "lm"), ("token_types", 0), ("module", None)):
        if (value := getattr(model, key)) != needed:
            problem = f"a model with model.encoder.layers has {str(needed).lower()}; leave it out"
            raise ConfigError(f"model.{key}", value, problem)
    if model.vocab_size is not None and encoder.start >= model.vocab_size:
        problem = f"no token of model.vocab_size={model.vocab_size}; use a smaller one"
        raise ConfigError("model.encoder.start", encoder.start, problem)


def check_media(model: ModelConfig) -> None:
    """Refuse encoders of images and sound that can't be, and their keys where there is none."""
    for name in MEDIA:
        own = medium(model, name)
        if own.layers:
            continue
        for one in fields(own):
            if (value := getattr(own, one.name)) != one.default:
                raise ConfigError(f"model.{name}.{one.name}", value, f"has no effect without model.{name}.layers")
    if not model.has_media:
        return
    if model.image.layers and model.image.channels not in (1, 3):
        raise ConfigError("model.image.channels", model.image.channels, "images have 1 (grey) or 3 (RGB); use one")
    for key, needed in (("encoder.layers", 0), ("token_types", 0), ("module", None)):
        if (value := attrgetter(key)(model)) != needed:
            problem = f"a model with {' and '.join(media(model))} has {str(needed).lower()}; leave it out"
            raise ConfigError(f"model.{key}", value, problem)
    if model.output not in ("lm", "classes"):
        problem = "a model that reads images or sound writes text or scores classes; use lm or classes"
        raise ConfigError("model.output", model.output, problem)
    for name in media(model):
        axes = PLACES[name]
        if (hidden := medium(model, name).hidden or model.hidden) % (2 * axes):
            problem = f"a sine and a cosine for each of {axes} coordinates need a multiple of {2 * axes}"
            raise ConfigError(f"model.{name}.hidden", hidden, problem)
    if not model.audio.layers:
        return
    if model.audio.hop < 1:
        problem = f"less than one sample at model.audio.rate={model.audio.rate}; use more"
        raise ConfigError("model.audio.hop_ms", model.audio.hop_ms, problem)
    if model.audio.window < model.audio.hop:
        problem = f"{model.audio.window} samples, and a hop has {model.audio.hop}; use as much, or more"
        raise ConfigError("model.audio.window_ms", model.audio.window_ms, problem)
    if model.audio.mels > model.audio.window // 2:
        problem = f"a frame of {model.audio.window} samples has {model.audio.window // 2} frequencies; use no more"
        raise ConfigError("model.audio.mels", model.audio.mels, problem)


def divisors(number: int) -> str:
    """All of them, as text."""
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
