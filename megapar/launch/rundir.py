"""The run directory: made once, by the process that composed the configuration."""

import json
import os
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import yaml

from megapar.config.check import value_of
from megapar.config.errors import ConfigError, UserError, show
from megapar.config.file import dump, load
from megapar.config.parse import changed, keys
from megapar.config.schema import TrainConfig
from megapar.launch.machine import environment

T = TypeVar("T", bound=TrainConfig)

NOT_THE_RUN = ("run.dir", "run.name", "out", "logger.progress")  # may differ when a run is started again


def create(config: T, overrides: list[str], backends: dict[str, str]) -> T:
    """Make the run directory of a resolved config and write config.yaml, overrides.yaml and environment.json.

    Returns the config with `run.dir` filled in. A directory that holds the same configuration is used again.
    Raises ConfigError for one that holds another, or that can't be written.
    """
    if config.run.dir is None:
        config = changed(config, {"run.dir": str(default_folder(config.run.name))})
    folder = Path(str(config.run.dir))
    _make_writable(folder)
    refuse_other_config(config)
    for name in ("logs", "checkpoints"):
        (folder / name).mkdir(exist_ok=True)
    write_atomic(folder / "config.yaml", dump(config))
    write_atomic(folder / "overrides.yaml", yaml.safe_dump(overrides, allow_unicode=True, width=1 << 30))
    facts = environment(config.train.device, backends)
    write_atomic(folder / "environment.json", json.dumps(facts, indent=2) + "\n")
    return config


def refuse_other_config(config: TrainConfig) -> None:
    """Raise ConfigError where the config's `run.dir` exists and holds another configuration."""
    path = Path(str(config.run.dir)) / "config.yaml"
    if config.run.dir is None or not path.exists():
        return
    remedy = "choose another run.dir or remove that folder"
    try:
        there = load(type(config), path)
    except UserError as error:
        raise ConfigError("run.dir", config.run.dir, f"holds a run of another kind ({error}); {remedy}") from None
    old = {key: value_of(there, key) for key in keys(type(config)) if key not in NOT_THE_RUN}
    new = {key: value_of(config, key) for key in old}
    different = [f"{key} was {show(old[key])}, now {show(new[key])}" for key in old if old[key] != new[key]]
    if different:
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        problem = f"holds a run of another configuration ({', '.join(different[:3])}{more}); {remedy}"
        raise ConfigError("run.dir", config.run.dir, problem)


def load_config(run_dir: str | Path) -> TrainConfig:
    """The resolved config of a run. Raises UserError naming the file."""
    return load(TrainConfig, Path(run_dir) / "config.yaml")


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, sees the old one or the new one and never a part."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def default_folder(name: str, parent: Path = Path("runs")) -> Path:
    """runs/DATE-TIME-NAME, made now; a number follows where another run took that name."""
    stem = f"{datetime.now():%Y%m%d-%H%M%S}-{name.replace('/', '-')}"
    for number in range(1, 1000):
        folder = parent / (stem if number == 1 else f"{stem}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(
                "run.dir", folder, f"can't be made ({error.strerror}); name another with run.dir="
            ) from None
        return folder
    raise ConfigError("run.name", name, f"{parent} is full of runs of this second; use another name")


def _make_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        problem = f"can't be written ({error.strerror}); choose another folder"
        raise ConfigError("run.dir", folder, problem) from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
