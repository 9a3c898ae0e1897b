"""Update rules: what an optimizer does to weights, given their gradients. Arithmetic that knows no ranks.

Each is a file of this room with one object, `OPTIMIZER = OptimizerKind(...)`, and `optim.name` is the file's name.
Importing one does not import torch, as a configuration is checked without it. `megapar.optim` runs them on what a rank
owns. docs/howto/add-an-optimizer.md adds one.
"""

import importlib
from pkgutil import iter_modules

from megapar.update_rules.kind import OptimizerKind


def optimizer_names() -> list[str]:
    """What `optim.name` takes."""
    return sorted(module.name for module in iter_modules(__path__) if module.name != "kind")


def optimizer_kind(name: str) -> OptimizerKind:
    """The optimizer of that name; `megapar.config.check` has refused any other."""
    found: OptimizerKind = importlib.import_module(f"{__name__}.{name}").OPTIMIZER
    return found
