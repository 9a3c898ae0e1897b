"""The configuration: `schema` says which keys exist, `parse` reads them strictly, `check` derives and refuses."""

from megapar.config.check import check, check_forward, feasible_layouts, with_layout
from megapar.config.derive import resolve, resolve_forward
from megapar.config.errors import ConfigError, UserError
from megapar.config.layout import Layout
from megapar.config.parse import parse, to_dict
from megapar.config.run_schema import GenerateConfig
from megapar.config.schema import TrainConfig, VerifyConfig

__all__ = [
    "ConfigError",
    "GenerateConfig",
    "Layout",
    "TrainConfig",
    "UserError",
    "VerifyConfig",
    "check",
    "check_forward",
    "feasible_layouts",
    "parse",
    "resolve",
    "resolve_forward",
    "to_dict",
    "with_layout",
]
