"""Pipeline schedules as data: written by pure functions, proven by one checker. No tensors, no processes.

`megapar.schedule(...)` calls this package: see `megapar.library.schedules.schedule`.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """A package that can be called. The function is above this floor, so it is imported when it is called."""

    def __call__(self, name: str, *, ranks: int, microbatches: int, chunks: int | None = None, **costs: Any) -> Any:
        """A schedule to look at, see `megapar.library.schedules.schedule`."""
        made_by = import_module("megapar.library.schedules").schedule
        return made_by(name, ranks=ranks, microbatches=microbatches, chunks=chunks, **costs)


sys.modules[__name__].__class__ = _Callable
