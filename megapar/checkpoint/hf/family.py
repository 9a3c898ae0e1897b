"""What a family of models is on disk: one table of names, and what its config.json says in terms of `model.*`."""

import importlib
import math
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from megapar.config.derive import model_sizes
from megapar.config.errors import UserError, show
from megapar.config.keys import changed
from megapar.config.parse import parse
from megapar.config.schema import ModelConfig

LAYER, PREFIX = "{}", "{p}"  # in names: the number of a layer, and what a family's tensors may begin with


@dataclass(frozen=True)
class Stored:
    """A tensor on disk. ours: the logical parameters in it, stacked along their first dim; transposed: their last.
    gated: of models whose MLP has a gate, or of those without; None: of both."""

    disk: str
    ours: tuple[str, ...]
    transposed: bool = False
    gated: bool | None = None


def linear(disk: str, *ours: str, transposed: bool = False) -> tuple[Stored, Stored]:
    """Weight and bias of a linear layer, or of several that are one on disk. transposed: the weight is [in, out]."""
    weights, biases = tuple(f"{name}.weight" for name in ours), tuple(f"{name}.bias" for name in ours)
    return Stored(f"{disk}.weight", weights, transposed), Stored(f"{disk}.bias", biases)


@dataclass(frozen=True)
class Field:
    """A key of config.json that is a key of `model`. default: where config.json leaves it out; values: theirs by ours,
    if they are not the same; needed: config.json has to have it."""

    disk: str
    ours: str
    default: Any = None
    values: Mapping[str, Any] | None = None
    needed: bool = False

    def read(self, config: Mapping[str, Any]) -> Any:
        value = config.get(self.disk, self.default)
        if value is None and self.needed:
            raise UserError(f"has no {self.disk}; add it")
        if self.values is None:
            return value
        for ours, theirs in self.values.items():
            if value == theirs or (isinstance(theirs, tuple) and value in theirs):
                return ours
        known = [one for theirs in self.values.values() for one in (theirs if isinstance(theirs, tuple) else (theirs,))]
        raise UserError(f"{self.disk}={value!r} is not supported; there are {', '.join(map(repr, known))}")

    def write(self, model: ModelConfig) -> Any:
        value = getattr(model, self.ours)
        if self.values is None:
            return value
        if value not in self.values:
            raise UserError(f"model.{self.ours}={value}: there is no {self.disk} for it")
        theirs = self.values[value]
        return theirs[0] if isinstance(theirs, tuple) else theirs


Keys = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """A family by the `model_type` of its config.json.

    architecture: the class that `megapar export` names; others: further ones that can be read
    tensors: a superset of what its models have; prefixes: what `{p}` may be, `megapar export` writes the first
    fixed: keys of `model` that every one of its models has
    must: keys of config.json, where they are there, with the values that we know what to do with
    read: more keys of `model` from config.json and what is read already; write: more of config.json from `model`
    length: the key of the most positions
    ignored: patterns of tensors that hold no weights of ours, such as masks
    renamed: names of older files, by what they are called today
    untied_by: a tensor that only a model with a head of its own has, where config.json can say otherwise
    """

    model_type: str
    architecture: str
    tensors: tuple[Stored, ...]
    fields: tuple[Field, ...]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    must: Mapping[str, Any] = field(default_factory=dict)
    read: Callable[[Mapping[str, Any], Keys], Keys] = lambda config, keys: {}
    write: Callable[[ModelConfig], Keys] = lambda model: {}
    length: str = "max_position_embeddings"
    default_length: int = 2048
    others: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ("",)
    ignored: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    untied_by: str | None = None

    def model_keys(self, config: Mapping[str, Any]) -> Keys:
        """Keys of `model` from a config.json. Raises UserError for what we can't compute."""
        for name, value in self.must.items():
            allowed = value if isinstance(value, tuple) else (value,)
            if name in config and config[name] not in allowed:
                known = ", ".join(repr(one) for one in allowed)
                raise UserError(f"{name}={config[name]!r} is not supported; {self.model_type} is read with {known}")
        keys = {**self.fixed, **{one.ours: one.read(config) for one in self.fields}}
        return keys | self.read(config, keys)

    def disk_config(self, model: ModelConfig, length: int) -> Keys:
        """config.json of a resolved model. length: its most positions. Raises UserError where the family has no such
        models."""
        config = {
            "model_type": self.model_type,
            "architectures": [self.architecture],
            **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),  # defaults may be beyond the vocabulary
            **{one.disk: one.write(model) for one in self.fields},
            **{name: value[0] if isinstance(value, tuple) else value for name, value in self.must.items()},
            **self.write(model),
            self.length: length,
        }
        again = in_full(to_model(self.model_keys(config)))
        for name, value in in_full(model).items():
            if not same(again[name], value):
                raise UserError(f"no {self.model_type} has model.{name}={show(value)}")
        return config


NOT_ON_DISK = {
    "module",
    "dropout",
    "attention_dropout",
    "init_std",
    "lora",
}  # keys of `model` without which logits are the same


def to_model(keys: Keys) -> ModelConfig:
    """The model of these keys, with nothing said that is so by default. Raises UserError for keys of another type."""
    model = parse(ModelConfig, {name: value for name, value in keys.items() if value is not None})
    full = in_full(model)
    defaults = {
        "qkv_bias": model.bias,
        "attention_out_bias": model.bias,
        "attention_scale": full["head_dim"] ** -0.5,
    }
    return changed(model, {name: None for name, value in defaults.items() if same(full[name], value)})


def in_full(model: ModelConfig) -> Keys:
    """Every key that changes logits, with what is derived; what has no effect is left out."""
    keys = {**vars(model), **model_sizes(model), **model.biases}
    keys["attention_scale"] = model.attention_scale or keys["head_dim"] ** -0.5
    keys["pooling"] = model.pools
    without_effect = set(NOT_ON_DISK) | ({"pooling", "classes"} if model.has_logits else set())
    if model.position != "rope":
        without_effect |= {"rope_theta", "rope_scaling", "window_rope_theta"}
    if model.position != "relative":
        without_effect |= {"relative_buckets", "relative_distance"}
    if model.window is None:
        without_effect |= {"window_pattern", "window_rope_theta"}
    return {name: value for name, value in keys.items() if name not in without_effect}


def same(a: Any, b: Any) -> bool:
    return math.isclose(a, b, rel_tol=1e-9) if isinstance(a, float) and isinstance(b, float) else a == b


@cache
def families() -> dict[str, Family]:
    """Every family by its model_type: each file of families/ has a tuple FAMILIES."""
    package = importlib.import_module("megapar.checkpoint.hf.families")
    found: dict[str, Family] = {}
    for module in _modules(package):
        for one in module.FAMILIES:
            assert one.model_type not in found, f"two families called {one.model_type}"
            found[one.model_type] = one
    return found


def _modules(package: Any) -> Iterator[Any]:
    for found in sorted(pkgutil.iter_modules(package.__path__), key=lambda module: module.name):
        yield importlib.import_module(f"{package.__name__}.{found.name}")
