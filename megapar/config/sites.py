"""The places of a model whose tensors can be seen and replaced: their names, and how a rank's part of one lies.

| site                        | tensor of a token                            | a rank has                       |
|-----------------------------|----------------------------------------------|----------------------------------|
| `embedding`                 | [H], the residual stream in front of layer 0 | all, or its share of the tokens  |
| `layers.N`                  | [H], the residual stream behind layer N      | the same                         |
| `layers.N.attention.q`      | [N, D], also `k` and `v` [K, D], as projected | its heads                        |
| `layers.N.attention.heads`  | [N, D], what every head reads                | its heads                        |
| `layers.N.attention.out`    | [H], what attention adds                     | all, or its share of the tokens  |
| `layers.N.attention.weights`| [N, S], how much a query sees of every key   | its heads                        |
| `layers.N.cross.heads`, `out` | as of attention, in a decoder's layer      | the same                         |
| `layers.N.mlp.inner`        | [F], behind the activation                   | its features                     |
| `layers.N.mlp.out`          | [H], what the MLP adds                       | all, or its share of the tokens  |
| `norm`                      | [H], behind the last norm                    | all, or its share of the tokens  |
| `logits`                    | [V]                                          | its part of the vocabulary       |

In front of a name may stand a stack's: `encoder.layers.0`, `image.layers.1.mlp.out`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from megapar.config.errors import ConfigError
from megapar.config.schema import ModelConfig
from megapar.config.stacks import TRUNK, prefix, stack_layers, stack_model, stacks

OF_LAYERS = {
    "": "",
    "attention.q": "attention.qkv",
    "attention.k": "attention.qkv",
    "attention.v": "attention.qkv",
    "attention.heads": "attention.out",
    "attention.out": "attention.out",
    "attention.weights": "attention",
    "cross.heads": "cross.out",
    "cross.out": "cross.out",
    "mlp.inner": "mlp.down",
    "mlp.out": "mlp.down",
}  # the module whose input or output it is, by what stands behind the layer's number
OUTSIDE = {"embedding": "embedding", "norm": "head.norm", "logits": "head"}  # the same outside the layers
INPUTS = ("attention.heads", "cross.heads", "mlp.inner")  # of their modules; the others are outputs
WEIGHTS = "attention.weights"
HEADS = ("attention.q", "attention.k", "attention.v", "attention.heads", "cross.heads", WEIGHTS)  # by head
FEATURES = ("mlp.inner", "logits")  # by feature; the others have a token's whole vector
_LAYER = re.compile(r"layers\.(\d+)(?:\.(.+))?")


@dataclass(frozen=True)
class Site:
    """stack: whose it is; layer: its number, None outside the layers; kind: a key of OF_LAYERS, or the whole name"""

    name: str
    stack: str
    layer: int | None
    kind: str

    @property
    def path(self) -> str:
        """Of the module at which it is found, in its layer or in its stack."""
        return OUTSIDE[self.kind] if self.layer is None else OF_LAYERS[self.kind]

    @property
    def is_input(self) -> bool:
        return self.kind in INPUTS


def sites_of(names: Sequence[str], model: ModelConfig, key: str) -> list[Site]:
    """Raises ConfigError for `key` where a model has no such place."""
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ConfigError(key, names, "give a list of names, such as [layers.0.attention.heads]")
    return [_site(name, model, key) for name in names]


def blocks_of(site: Site, model: ModelConfig) -> int:
    """How many heads or features its tensor has; 1 where a token's vector is whole."""
    own = stack_model(model, site.stack)
    if site.kind in ("attention.k", "attention.v"):
        return own.kv_heads or own.heads
    if site.kind in HEADS:
        return own.heads
    return {"mlp.inner": own.ffn, "logits": own.vocab_size}.get(site.kind) or 1


def residual_sites(model: ModelConfig) -> list[str]:
    """The residual stream in front of the first layer and behind each, of every stack."""
    found = ["embedding"]
    for stack in stacks(model):
        found += [f"{prefix(stack)}layers.{index}" for index in range(stack_layers(model, stack))]
    return found


def _site(name: str, model: ModelConfig, key: str) -> Site:
    first, _, rest = name.partition(".")
    stack = first if first in stacks(model) and first else TRUNK
    below = rest if stack else name
    outside = _outside(model, stack)
    if below in outside:
        return Site(name, stack, None, below)
    before, count = prefix(stack), stack_layers(model, stack)
    kinds = [kind for kind in OF_LAYERS if not kind.startswith("cross.") or (model.encoder.layers and not stack)]
    if (found := _LAYER.fullmatch(below)) and int(found[1]) < count:
        if (kind := found[2] or "") in kinds:
            return Site(name, stack, int(found[1]), kind)
        known = ", ".join(f"{before}layers.{found[1]}.{kind}" for kind in kinds if kind)
        problem = f"this layer has {before}layers.{found[1]}, {known}"
    else:
        there = [*(f"{before}{one}" for one in outside), f"{before}layers.0 to {before}layers.{count - 1}"]
        problem = f"there are {', '.join(there)}, and places in a layer such as {before}layers.0.attention.heads"
    inside = [f"layers.{index}{kind and '.'}{kind}" for index in range(count) for kind in kinds]
    beyond = found is not None and int(found[1]) >= count
    near = [] if beyond else get_close_matches(below, [*outside, *inside], 1, 0.8)
    meant = f"; did you mean {before}{near[0]}?" if near else ""
    raise ConfigError(key, name, f"no such place; {problem}{meant}")


def _outside(model: ModelConfig, stack: str) -> tuple[str, ...]:
    """Places of a stack outside its layers."""
    if stack == TRUNK:
        return ("embedding", "norm", "logits") if model.has_logits else ("embedding",)
    return ("embedding",) if stack == "encoder" else ()
