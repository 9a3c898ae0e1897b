"""What is known of a configuration key besides its type and default, declared where the key is.

A key is a dataclass field made by `option`, a group of keys one made by `group`. What other rooms need to know of a
key (its bounds, whether it is a path, whether a run may be resumed with another value) is an `Option` in the field's
metadata, so that no list of key names stands anywhere else.
"""

import operator
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar, get_type_hints

from megapar.config.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Option:
    """The facts of one key.

    help: the line that `--info config` prints beside it
    at_least, above, at_most, below: bounds of a number; `above` and `below` are themselves not allowed. In a list they
        hold for every item.
    empty: why an empty text won't do
    verbatim: taken as it stands after the first `=`: never parsed as Hydra grammar, never swept
    path: a leading ~ is the home folder
    fixed: a checkpoint is only loaded by a config with the same value: it says what the weights mean, or which samples
        come next
    head: it says what the last part is made of; where that is another one, weights are taken without it (`head_anew`)
    kept: a run only goes on with the same value, as with that of every fixed key
    identity: part of what a run is: another value is said when a run goes on, and verify doesn't use a directory again
    also: what other programs call this key, for suggestions
    """

    help: str
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    empty: str | None = None
    verbatim: bool = False
    path: bool = False
    fixed: bool = False
    kept: bool = False
    head: bool = False
    identity: bool = True
    also: tuple[str, ...] = ()

    def refusal(self, value: object) -> str | None:
        """Why a value is out of bounds; None if it is not."""
        if value == "":
            return self.empty
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        for bound, allowed, words in (
            (self.at_least, operator.ge, "at least"),
            (self.above, operator.gt, "more than"),
            (self.at_most, operator.le, "at most"),
            (self.below, operator.lt, "less than"),
        ):
            if bound is not None and not allowed(value, bound):
                return f"must be {words} {bound}"
        return None


def option(default: Any, help: str, **facts: Any) -> Any:
    """A dataclass field with a default and the facts of its key, see `Option`."""
    metadata = {"option": Option(help, **facts)}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def group(kind: type, help: str) -> Any:
    """A nested group of options."""
    return field(default_factory=kind, metadata={"option": Option(help)})


def known_fields(kind: Any) -> dict[str, tuple[Field[Any], Any]]:
    """(field, type) of every field of a configuration class, by name."""
    hints = get_type_hints(kind)
    return {one.name: (one, hints[one.name]) for one in fields(kind)}


def keys(kind: Any) -> dict[str, Option]:
    """Every dotted key of a configuration class, groups left out, in the order of the schema."""
    found: dict[str, Option] = {}
    for name, (one, hint) in known_fields(kind).items():
        if is_dataclass(hint):
            found |= {f"{name}.{below}": facts for below, facts in keys(hint).items()}
        else:
            found[name] = one.metadata["option"]
    return found


def groups(kind: Any) -> dict[str, str]:
    """Dotted key of every group of a configuration class, with its description."""
    found: dict[str, str] = {}
    for name, (one, hint) in known_fields(kind).items():
        if is_dataclass(hint):
            found[name] = one.metadata["option"].help
            found |= {f"{name}.{below}": text for below, text in groups(hint).items()}
    return found


def value_of(config: Any, key: str) -> Any:
    """Value of a dotted key. Groups may be dataclasses or dicts, as those of another version's checkpoint are."""
    for name in key.split("."):
        config = config[name] if isinstance(config, Mapping) else getattr(config, name)
    return config


def changed(config: T, values: Mapping[str, Any]) -> T:
    """A copy of a config with values set by dotted key. The values are taken as they are, without `parse`'s checks."""
    for key, value in values.items():
        name, _, below = key.partition(".")
        if below:
            value = changed(getattr(config, name), {below: value})
        config = replace(config, **{name: value})  # type: ignore[type-var]
    return config


def check_values(config: Any, prefix: str = "") -> None:
    """Raise ConfigError for a value out of its key's bounds; None (not derived yet) passes. prefix: of the keys"""
    for key, facts in keys(type(config)).items():
        value = value_of(config, key)
        tables = value if isinstance(value, dict) else {}
        for name, options in tables.items():
            if is_dataclass(options):
                check_values(options, f"{prefix}{key}.{name}.")
        for item in value if isinstance(value, list) else [value]:
            if problem := facts.refusal(item):
                raise ConfigError(prefix + key, value, problem)
