"""What is found by name: modules of a package, without importing one, and functions that a key names."""

import importlib
import os
import sys
from collections.abc import Callable
from difflib import get_close_matches
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import Any

from megapar.config.errors import ConfigError


def modules_of(package: str) -> set[str]:
    """Names of the modules in a package."""
    found = find_spec(package)
    assert found is not None and found.submodule_search_locations is not None
    return {module.name for module in iter_modules(found.submodule_search_locations)}


def find_function(key: str, value: str, example: str, what: str) -> Callable[..., Any]:
    """What a key's value names, `package:function`; the package may be a file or a folder of the current folder.

    example: a value; what: it is, for messages, such as "a function that builds a stage". Raises ConfigError where it
    can't be imported, whatever it raises itself, and for what can't be called.
    """
    module, _, name = value.partition(":")
    if not all(part.isidentifier() for part in [*module.split("."), *name.split(".")]):
        raise ConfigError(key, value, f"use PACKAGE:FUNCTION, such as {example}")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        line = (str(error).splitlines() or [""])[0]
        raise ConfigError(key, value, f"{module} can't be imported ({type(error).__name__}: {line})") from error
    for attribute in name.split("."):
        if not hasattr(found, attribute):
            near = get_close_matches(attribute, [one for one in dir(found) if not one.startswith("_")], 1)
            where = getattr(sys.modules[module], "__file__", None) or "no file"
            meant = f"; did you mean {value.removesuffix(attribute)}{near[0]}?" if near else ""
            raise ConfigError(key, value, f"{module} has no {name} (it is {where}){meant}")
        found = getattr(found, attribute)
    if not callable(found):
        raise ConfigError(key, value, f"a {type(found).__name__} can't be called; name {what}")
    return found
