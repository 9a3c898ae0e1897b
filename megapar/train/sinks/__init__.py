"""Where rows go besides metrics.jsonl: each sink is a file of this folder with one object, `SINK`, found by itself."""

import importlib

from megapar.config.found import modules_of
from megapar.train.sinks.sink import Sink

__all__ = ["Sink", "sink_kinds"]


def sink_kinds() -> list[type[Sink]]:
    """Every sink, by name."""
    modules = (importlib.import_module(f"{__name__}.{name}") for name in sorted(modules_of(__name__)))
    return [module.SINK for module in modules if hasattr(module, "SINK")]
