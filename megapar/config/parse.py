"""Plain nested dicts to the frozen dataclasses of `schema`, strictly, and back.

Every refusal is a ConfigError of one line: the dotted key, the value, what is allowed.
"""

import difflib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from megapar.config.errors import ConfigError
from megapar.config.keys import groups, keys, known_fields

T = TypeVar("T")


def parse(kind: type[T], data: Mapping[str, Any], command: str = "train") -> T:
    """`kind` filled from a nested dict; keys left out keep their default. command: whose keys a refusal refers to

    Raises ConfigError for an unknown key or a value of another type. An integer counts as a float, text such as
    "1e-3" (what YAML 1.1 makes of it) too; a bool counts as nothing else.
    """
    return _parse(kind, data, "", lambda key, value: unknown_key(kind, key, value, command))


def to_dict(config: Any) -> dict[str, Any]:
    """The nested dict that `parse` turns back into an equal config."""
    return asdict(config)


def unknown_key(kind: type, key: str, value: object, command: str = "train") -> ConfigError:
    """The refusal of a key that a command's `kind` does not have, with the nearest one that it has."""
    near = nearest(key, kind)
    hint = f"did you mean {near}?" if near else f"`megapar {command} --info config` lists the keys"
    return ConfigError(key, value, f"unknown key; {hint}")


def nearest(key: str, kind: type) -> str | None:
    """The known key nearest to a mistyped one: the same last word first, then the most similar spelling."""
    options = keys(kind)
    known = [*options, *groups(kind)]
    leaf = key.rsplit(".", 1)[-1]
    meant = (name.rsplit(".", 1)[-1] for name, facts in options.items() if leaf in facts.also)
    leaf = next(meant, leaf)
    same_leaf = [k for k in known if k.rsplit(".", 1)[-1] == leaf]
    if same_leaf:
        return difflib.get_close_matches(key, same_leaf, n=1, cutoff=0.0)[0]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    if not near:  # a good last word in a wrong group, or without its group
        leaves = {k.rsplit(".", 1)[-1]: k for k in reversed(known)}
        near = [leaves[k] for k in difflib.get_close_matches(leaf, list(leaves), n=1, cutoff=0.75)]
    return near[0] if near else None


def _parse(kind: Any, data: object, prefix: str, refuse: Callable[[str, object], ConfigError]) -> Any:
    known = known_fields(kind)
    if not isinstance(data, Mapping):
        example = f"{prefix}{next(iter(known))}"
        raise ConfigError(prefix.rstrip("."), data, f"this is a group of keys; set one of them, such as {example}")
    values = {}
    for name, value in data.items():
        key = f"{prefix}{name}"
        if name not in known:
            raise refuse(key, value)
        hint: Any = known[name][1]
        values[name] = _parse(hint, value, key + ".", refuse) if is_dataclass(hint) else _convert(key, value, hint)
    return kind(**values)


def _convert(key: str, value: object, hint: Any) -> Any:
    tables = [get_args(choice)[1] for choice in get_args(hint) if get_origin(choice) is dict]
    if tables and is_dataclass(tables[0]):
        return None if value is None else _table(key, value, tables[0])
    for choice in get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,):
        good, result = _as(value, choice)
        if good:
            return result
    raise ConfigError(key, value, f"expects {describe(hint)}{_remedy(key, value, hint)}")


def _table(key: str, value: object, kind: Any) -> dict[str, Any]:
    """A key's groups of options by names of the user's own: a mapping, or its text in YAML."""
    known = ", ".join(known_fields(kind))
    if isinstance(value, str):
        import yaml  # here: who makes a configuration in Python needs no package for it

        try:
            value = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(key, value, f"not readable ({' '.join(str(error).split())})") from None
    if not isinstance(value, Mapping) or not all(isinstance(options, Mapping) for options in value.values()):
        raise ConfigError(key, value, f"expects NAME: {{OPTION: VALUE}} for every name; options are {known}")

    def refuse(option: str, given: object) -> ConfigError:
        return ConfigError(option, given, f"unknown key; there are {known}")

    return {str(name): _parse(kind, options, f"{key}.{name}.", refuse) for name, options in value.items()}


def _as(value: object, hint: Any) -> tuple[bool, Any]:
    """(fits, value converted)"""
    if hint is NoneType:
        return value is None, None
    if get_origin(hint) is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(hint)), value
    if get_origin(hint) is list:
        items = [_as(item, get_args(hint)[0]) for item in value] if isinstance(value, list | tuple) else [(False, None)]
        return all(good for good, _ in items), [item for _, item in items]
    if get_origin(hint) is dict:
        found = (
            {name: _as(each, get_args(hint)[1]) for name, each in value.items()} if isinstance(value, Mapping) else {}
        )
        fits = bool(found) and all(isinstance(name, str) and good for name, (good, _) in found.items())
        return fits, {name: result for name, (_, result) in found.items()}
    if isinstance(value, bool):
        return hint is bool, value
    if hint is float:
        if isinstance(value, str) and re.fullmatch(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+", value):
            value = float(value)
        try:
            number = float(value) if isinstance(value, int | float) else math.nan
        except OverflowError:  # an integer beyond every float
            number = math.inf
        return math.isfinite(number), number
    return isinstance(value, hint), value


def describe(hint: Any) -> str:
    """What a type allows, in words."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(describe(choice) for choice in args)
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in args)
    if origin is list:
        return f"a list such as [{'5,3' if args[0] is int else 'a,b'}]"
    if origin is dict:
        return f"NAME: VALUE for some names, each {describe(args[1])}"
    words = {int: "an integer", float: "a finite number", bool: "true or false", str: "text", NoneType: "null"}
    return words[hint]


def _remedy(key: str, value: object, hint: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool) and str in (hint, *get_args(hint)):
        return f"; quote a number that is meant as text: {key}='\"{value}\"'"
    return ""
