"""The configuration of a model from a function call: a name, a file or a ModelConfig, and keywords. Without Hydra."""

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from megapar.config.check import check
from megapar.config.derive import resolve
from megapar.config.errors import ConfigError, UserError
from megapar.config.keys import changed, group, keys
from megapar.config.layout import Layout
from megapar.config.parse import parse
from megapar.config.schema import DataConfig, ModelConfig, TrainConfig
from megapar.config.stages import make_schedule
from megapar.launch.machine import num_gpus
from megapar.schedule.actions import Schedule, ScheduleError
from megapar.schedule.check import check as prove

MODELS = Path(str(files("megapar.conf"))) / "model"
VOCABULARY = DataConfig().vocab_size  # where nobody says another: the size of the tokenizer that `megapar train` trains


@dataclass(frozen=True)
class _Model:
    model: ModelConfig = group(ModelConfig, "the model")


def settings(
    model: str | Path | ModelConfig,
    overrides: Mapping[str, Any],
    *,
    layout: str,
    dtype: str,
    device: str | None,
    seq_length: int | None,
    seed: int | None,
    schedule: str,
    chunks: int | None,
) -> TrainConfig:
    """The resolved and checked configuration of `megapar.build`. Raises ConfigError, one line."""
    values = {**base(model), **_known(overrides)}
    if values.get("vocab_size") is None:
        values["vocab_size"] = VOCABULARY
    ranks = Layout.parse(layout, "layout")
    train = {"dtype": dtype, "device": device or "auto", "seq_length": seq_length, "seed": seed}
    config = parse(
        TrainConfig,
        {
            "model": values,
            "train": {key: value for key, value in train.items() if value is not None},
            "parallel": dict(ranks),
            "pipeline": {"schedule": schedule, "chunks": chunks},
        },
    )
    config = with_microbatches(config, default_microbatches(config))
    gpus = num_gpus()
    config = resolve(config, num_gpus=gpus, world_size=ranks.world)
    check(config, num_gpus=gpus, world_size=ranks.world, task=False)
    return config


def base(model: str | Path | ModelConfig) -> dict[str, Any]:
    """The `model.*` keys that a name of conf/model/, a YAML file or a ModelConfig sets. Raises UserError."""
    if isinstance(model, ModelConfig):
        return asdict(model)
    if not isinstance(model, str | Path):
        raise UserError(f"model: expects a name, a path or a megapar.ModelConfig, not {type(model).__name__}")
    path, known = Path(model).expanduser(), sorted(file.stem for file in MODELS.glob("*.yaml"))
    if path.suffix not in (".yaml", ".yml"):
        if str(model) not in known:
            near = difflib.get_close_matches(str(model), known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(
                "model", model, f"no such model; {hint}there are {', '.join(known)}, or give a .yaml file"
            )
        path = MODELS / f"{model}.yaml"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError("model", model, f"can't be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError("model", model, f"not readable as YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise ConfigError("model", model, "holds no keys of a model; write lines such as layers: 4")
    return values


def _known(overrides: Mapping[str, Any]) -> Mapping[str, Any]:
    """The overrides, all of them keys of a model. Raises ConfigError with the nearest keyword."""
    own = [name for name, kind in inspect.signature(settings).parameters.items() if kind.kind is kind.KEYWORD_ONLY]
    model = {key.removeprefix("model."): facts for key, facts in keys(_Model).items()}
    for name, value in overrides.items():
        if name in model:
            continue
        near = [key for key, facts in model.items() if name in facts.also]
        near += difflib.get_close_matches(name, [*model, *own], n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join([*model, *own])}"
        raise ConfigError(name, value, f"unknown key; {hint}")
    return overrides


def default_microbatches(config: TrainConfig) -> int:
    """Of one data-parallel rank where nobody says: 1 without a pipeline, else two for every pipeline rank."""
    return 1 if config.parallel.pp == 1 else 2 * config.parallel.pp


def with_microbatches(config: TrainConfig, microbatches: int) -> TrainConfig:
    """The config for steps of so many micro-batches on a data-parallel rank. The size of one is the caller's."""
    samples = microbatches * config.parallel.layout.over("samples")
    return changed(config, {"train.micro_batch_size": 1, "train.global_batch_size": samples})


def proven_schedule(config: TrainConfig, microbatches: int) -> Schedule:
    """The config's schedule for so many micro-batches. Raises ConfigError where it can't be had."""
    try:
        schedule = make_schedule(with_microbatches(config, microbatches))
        prove(schedule)
    except ScheduleError as error:
        raise ConfigError("microbatches", microbatches, str(error)) from None
    return schedule
