"""What happens around the steps of a run: each hook is a file of this folder with one object, `HOOK`, found by itself.

Hooks nest around a step: `after` goes through them by their `order`, `before` backwards. Every method is collective.
"""

import importlib
import pkgutil

from megapar.train.hooks.hook import Hook

__all__ = ["Hook", "hook_kinds"]


def hook_kinds() -> list[type[Hook]]:
    """Every hook, in order."""
    modules = (importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__))
    return sorted((module.HOOK for module in modules if hasattr(module, "HOOK")), key=lambda kind: kind.order)
