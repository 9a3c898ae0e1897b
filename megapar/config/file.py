"""A configuration on disk or on its way to other ranks: YAML text, without Hydra."""

import os
from pathlib import Path
from typing import TypeVar

from megapar.config.errors import ConfigError, UserError
from megapar.config.keys import changed
from megapar.config.parse import parse, to_dict
from megapar.config.run_schema import ExportConfig, ForwardConfig
from megapar.config.schema import TrainConfig

T = TypeVar("T")


def dump(config: object) -> str:
    """The YAML text that `loads` turns back into an equal config."""
    import yaml  # here: who makes a configuration in Python needs no package for it

    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=1 << 30)


def loads(kind: type[T], text: str) -> T:
    """Config from YAML text. Raises ConfigError for keys or values that `kind` refuses."""
    import yaml

    return parse(kind, yaml.safe_load(text))


def load(kind: type[T], path: str | Path) -> T:
    """Config from a YAML file, such as a run's `config.yaml`. Raises UserError naming the file."""
    import yaml

    try:
        return loads(kind, Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; is this the folder of a run?") from None
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable configuration ({' '.join(str(error).split())})") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def load_config(run_dir: str | Path) -> TrainConfig:
    """The resolved config of a run. Raises UserError naming the file."""
    return load(TrainConfig, Path(run_dir) / "config.yaml")


def load_trained(config: ForwardConfig | ExportConfig) -> TrainConfig:
    """The config of the run that a command uses, with what the command says of its model. Raises UserError."""
    trained, base = load_config(str(config.run.dir)), config.checkpoint.base
    if base is None:
        return trained
    if not trained.model.lora.rank:
        raise ConfigError("checkpoint.base", base, "the run has no adapters; leave it out")
    return changed(trained, {"model.lora.base": os.path.abspath(base)})
