"""megapar: 3D-parallel Transformer training for research.

In a notebook or a script of your own (docs/library.md):

    model = megapar.build("tiny", layers=2)       a model, `megapar.Model`
    model = megapar.from_hf("folder")             one with the weights of a Hugging Face folder
    optimizer = megapar.AdamW(model, lr=1e-3)     or Lion, Muon, or torch's own
    megapar.schedule("zbv", ranks=4, microbatches=16).draw()
    with megapar.capture(model, ["layers.1.attention.weights"]) as seen:     what passes there; also megapar.patch
        model(ids)

Importing megapar imports neither torch nor Hydra: these names are fetched when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megapar.config.errors import ConfigError, UserError
    from megapar.config.schema import ModelConfig
    from megapar.data.media.samples import MediaSample
    from megapar.interpret.capture import Capture as capture
    from megapar.interpret.lens import logit_lens
    from megapar.interpret.patch import Patch as patch
    from megapar.interpret.probe import linear_probe
    from megapar.library.hf import from_hf
    from megapar.library.model import Model, build
    from megapar.library.optimizer import AdamW, Lion, Muon

__version__ = "0.1.0"
__all__ = [
    "AdamW",
    "ConfigError",
    "Lion",
    "MediaSample",
    "Model",
    "ModelConfig",
    "Muon",
    "UserError",
    "build",
    "capture",
    "from_hf",
    "linear_probe",
    "logit_lens",
    "patch",
    "schedule",
]

_WHERE = {
    "AdamW": "megapar.library.optimizer",
    "ConfigError": "megapar.config.errors",
    "Lion": "megapar.library.optimizer",
    "MediaSample": "megapar.data.media.samples",
    "Model": "megapar.library.model",
    "ModelConfig": "megapar.config.schema",
    "Muon": "megapar.library.optimizer",
    "UserError": "megapar.config.errors",
    "build": "megapar.library.model",
    "capture": "megapar.interpret.capture:Capture",
    "from_hf": "megapar.library.hf",
    "linear_probe": "megapar.interpret.probe",
    "logit_lens": "megapar.interpret.lens",
    "patch": "megapar.interpret.patch:Patch",
}  # module, and what it is called there where that is another name


def __getattr__(name: str) -> Any:
    if name == "schedule":  # the room of schedules, which can be called
        return import_module("megapar.schedule")
    if name not in _WHERE:
        raise AttributeError(f"module 'megapar' has no attribute {name!r}")
    module, _, called = _WHERE[name].partition(":")
    value = globals()[name] = getattr(import_module(module), called or name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
