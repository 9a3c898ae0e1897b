"""A library model beside the reference: the same sizes, the same weights."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

import megapar
from tests import reference

SMALL: dict[str, Any] = {"layers": 2, "hidden": 16, "heads": 4, "ffn": 32, "vocab_size": 61}
STYLES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama_small", {"kv_heads": 2}),
    "llama tied": ("llama_small", {"kv_heads": 2, "tied": True}),
    "gpt2": ("gpt2_tiny", {}),
    "gpt2 untied": ("gpt2_tiny", {"tied": False}),
}
LENGTH = 8


def ours(style: str = "llama", **values: Any) -> megapar.Model:
    name, switches = STYLES[style]
    return megapar.build(name, **{"dtype": "fp64", "seq_length": LENGTH, **SMALL, **switches, **values})


def plain(model: megapar.Model) -> reference.Model:
    """The reference with a model's sizes and weights."""
    own = asdict(model.config.model)
    kept = ("hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab_size", "layers", "bias", "tied")
    switches = {
        "layernorm": own["norm"] == "layernorm",
        "rope": own["position"] == "rope",
        "activation": own["activation"],
        "positions": model.config.train.seq_length,
    }
    same = {key: own[key] for key in (*kept, "norm_eps", "rope_theta")}
    made = reference.Model(same | switches).double()
    made.load_state_dict(model.weights(), strict=not own["tied"])
    return made


def batch(seed: int = 0, samples: int = 4, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    """(ids, labels), int64 [samples, length]."""
    draws = torch.Generator().manual_seed(seed)
    windows = torch.randint(SMALL["vocab_size"], (samples, length + 1), generator=draws)
    return windows[:, :-1].clone(), windows[:, 1:].clone()


def gradients(model: megapar.Model) -> dict[str, Tensor]:
    """Copies of the rows of every `.grad` by logical name."""
    found = {}
    for local in model.part.context.parameters:
        assert local.tensor.grad is not None, local.name
        for piece in local.pieces:
            found[piece.record.name] = local.tensor.grad[piece.start : piece.stop].clone()
    return found


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference between two sets of tensors, relative to each tensor's largest element."""
    assert ours.keys() == theirs.keys()
    return max(((ours[name] - one).abs().max() / one.abs().max()).item() for name, one in theirs.items())
