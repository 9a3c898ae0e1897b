"""Hydra, and nothing but Hydra: from command-line overrides to a config object. Imported lazily, in the launcher only.

Three things stand between the command line and Hydra. Verbatim keys are cut out, as free text and paths are not Hydra
grammar. Every key and file name is checked first, as Hydra accepts unknown keys after `+` and does not suggest.
And what Hydra itself refuses becomes one line.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from os.path import expanduser
from pathlib import Path
from typing import Any

import yaml

from megapar.cli.command import Command, commands
from megapar.cli.experiments import EXPERIMENT, Experiments
from megapar.config import ConfigError, Layout, UserError, parse, to_dict
from megapar.config.errors import show
from megapar.config.file import load_config
from megapar.config.keys import changed, check_values, groups, keys, value_of
from megapar.config.parse import nearest, unknown_key

CONF = Path(str(files("megapar.conf")))
LAYOUTS = "parallel"  # the group whose choices need no file
MODEL = "model"  # the group whose choices may be folders


@dataclass(frozen=True)
class Overrides:
    """The overrides of one command line: those for Hydra, and the verbatim ones by key (the last one wins)."""

    hydra: list[str]
    verbatim: dict[str, str]

    def as_list(self) -> list[str]:
        """All of them, as they could be typed again."""
        return [*self.hydra, *(f"{key}={value}" for key, value in self.verbatim.items())]


def split(arguments: Iterable[str]) -> Overrides:
    """Cut the verbatim keys out: everything after their first `=` is their value."""
    hydra, verbatim = [], {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        table = key == "pipeline.schedule" and value.startswith("csv:")  # a path; names of schedules can be swept
        if equals and (key in verbatim_keys() or table):
            if not value and key != "prompt":
                raise ConfigError(key, "", "empty; give a value or leave it out")
            verbatim[key] = value
        else:
            hydra.append(argument)
    return Overrides(hydra, verbatim)


@cache
def verbatim_keys() -> frozenset[str]:
    """The verbatim keys of all commands."""
    kinds = (command.config for command in commands().values())
    return frozenset(key for kind in kinds for key, facts in keys(kind).items() if facts.verbatim)


def compose(command: str, overrides: Overrides) -> Any:
    """The config object of a command. Raises UserError, one line, for anything that can't be composed."""
    refuse_unknown(command, overrides)
    register(overrides.hydra)
    hydra_overrides = [*_own(commands()[command], overrides.hydra), *overrides.hydra]
    return read(command, _composed(command, hydra_overrides), overrides.verbatim)


def read(command: str, composed: dict[Any, Any], verbatim: Mapping[str, str]) -> Any:
    """The config object from what Hydra composed and the verbatim values; `~` in paths becomes the home folder.

    Raises ConfigError for unknown keys, and for values of another type or out of their key's bounds.
    """
    for key, value in verbatim.items():
        *path, name = key.split(".")
        node = composed
        for part in path:
            node = node.setdefault(part, {})
        node[name] = value
    kind = commands()[command].config
    config: Any = parse(kind, composed, command)
    paths = {key: value_of(config, key) for key, facts in keys(kind).items() if facts.path}
    config = changed(config, {key: expanduser(path) for key, path in paths.items() if path is not None})
    check_values(config)
    return config


def _composed(command: str, overrides: list[str]) -> dict[Any, Any]:
    import hydra
    from omegaconf import OmegaConf

    with one_line_errors(), hydra.initialize_config_module("megapar.conf", version_base="1.3"):
        named = [with_names(text) for text in overrides]
        composed = OmegaConf.to_container(hydra.compose(root_file(command), overrides=named), resolve=True)
    assert isinstance(composed, dict)
    return composed


def _own(command: Command, overrides: list[str]) -> list[str]:
    """Overrides that set the command's own keys to what they would be without an experiment."""
    others = [text for text in overrides if not text.startswith(f"{EXPERIMENT}=")]
    if not command.own or len(others) == len(overrides):
        return []
    without = _composed(command.name, others)
    return [f"{key}={show(value_of(without, key))}" for key in command.own]


def root_file(command: str) -> str:
    """Name of the file of `conf/` that a command begins with: `bench_kernels` for `bench kernels`."""
    return command.replace(" ", "_")


def register(overrides: Iterable[str]) -> None:
    """Make available to Hydra what is in no file of conf/.

    The dataclasses' defaults as `base/COMMAND`, the first of every root file's defaults, and a root for each command
    that has no such file; the experiments of experiments/ folders; and as a choice of the group `parallel` every
    layout that is named in the overrides or in an experiment. Raises UserError for an experiment that can't be read.
    """
    from hydra.core.config_store import ConfigStore

    store, overrides, experiments = ConfigStore.instance(), list(overrides), Experiments.here(CONF)
    texts = [*overrides, *experiments.texts()]
    for name in {name for text in texts for name in re.findall(r"[a-z0-9]+", text) if is_layout(name)}:
        store.store(group=LAYOUTS, name=name, node=dict(Layout.parse(name)), provider="megapar")
    for name, path in model_paths(texts).items():
        store.store(group=MODEL, name=name, node=read_model(path), provider="megapar")
    store.repo.pop(EXPERIMENT, None)  # of an earlier call in this process, maybe in another folder
    for name, node in experiments.outside(overrides).items():
        store.store(group=EXPERIMENT, name=name, node=node, package="_global_", provider="megapar")
    for command in commands().values():
        root, node = root_file(command.name), to_dict(command.config())
        store.store(group="base", name=root, node=node, package="_global_", provider="megapar")
        if not (CONF / f"{root}.yaml").exists():
            store.store(name=root, node={"defaults": [f"base/{root}", "_self_"]}, provider="megapar")


def is_layout(name: str) -> bool:
    """Whether it is the name of a layout, other than `single`, which is a file."""
    with suppress(ConfigError):
        return name != "single" and bool(Layout.parse(name))
    return False


def is_model_path(name: str) -> bool:
    """Whether a choice of the group `model` is a path: a run's directory, a Hugging Face folder or a YAML file."""
    return not (CONF / MODEL / f"{name}.yaml").exists() and ("/" in name or Path(name).exists())


def _name_of(path: str) -> str:
    """What Hydra knows a path by: it takes slashes for groups."""
    return f"path-{hashlib.blake2b(path.encode(), digest_size=8).hexdigest()}"


def _choices(value: str) -> list[str]:
    """Of a value of the group `model`: a path that is there, or several choices of a sweep."""
    return [value] if Path(value).exists() else value.split(",")


def model_paths(overrides: Iterable[str]) -> dict[str, str]:
    """The paths that are chosen of the group `model`, by what Hydra knows them by."""
    values = [value for text in overrides for value in re.findall(rf"^{MODEL}=(.*)", text)]
    return {_name_of(path): path for value in values for path in _choices(value) if is_model_path(path)}


def with_names(override: str) -> str:
    """An override as Hydra can read it: paths of the group `model` by their names."""
    group, _, value = override.partition("=")
    if group != MODEL:
        return override
    return f"{group}={','.join(_name_of(one) if is_model_path(one) else one for one in _choices(value))}"


def read_model(name: str) -> dict[str, Any]:
    """The keys of `model` of a path. Raises UserError."""
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml"):
        try:
            keys = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(MODEL, name, f"can't be read ({' '.join(str(error).split())})") from None
        if not isinstance(keys, dict):
            raise ConfigError(MODEL, name, "holds no keys of a model; write lines such as layers: 4")
        return keys
    if (path / "config.yaml").exists():
        return to_dict(load_config(path).model)
    from megapar.checkpoint.hf.folder import CONFIG, model_keys  # torch

    if not (path / CONFIG).exists():
        problem = "no such folder" if not path.is_dir() else f"holds neither a run's config.yaml nor {CONFIG}"
        raise ConfigError(MODEL, name, f"{problem}; name a file of conf/model/, a run, or a Hugging Face folder")
    return model_keys(path)[0]


def group_files(command: str) -> dict[str, list[str]]:
    """The groups of a command, in the order of its defaults list, and the files of each."""
    path = CONF / f"{root_file(command)}.yaml"
    if not path.exists():
        return {}
    root = yaml.safe_load(path.read_text(encoding="utf-8"))
    names = [next(iter(entry)) for entry in root["defaults"] if isinstance(entry, dict)]
    found = {name: sorted(path.stem for path in (CONF / name).glob("*.yaml")) for name in names}
    if EXPERIMENT in found:
        found[EXPERIMENT] = Experiments.here(CONF).names()
    return found


def refuse_unknown(command: str, overrides: Overrides, multirun: bool = False) -> None:
    """Refuse keys, groups and files that do not exist, and operators that can't do good here."""
    kind = commands()[command].config
    for key, value in overrides.verbatim.items():
        if key not in keys(kind):
            raise unknown_key(kind, key, value, command)
    known_groups = group_files(command)
    folders = {path.name for path in CONF.iterdir() if path.is_dir()}
    for parsed in _parsed(overrides.hydra):
        name, text = parsed.key_or_group, parsed.input_line or ""
        value = text.partition("=")[2]
        if name.split("/")[0].split(".")[0] == "hydra":
            if not multirun:
                raise ConfigError(name, value, "Hydra's own settings only matter in a sweep; add -m, or leave it out")
            continue
        if parsed.is_delete():
            raise UserError(f"{text}: a key can't be removed; give it another value, or leave it out for its default")
        if parsed.package is not None:
            raise UserError(f"{text}: files can't be moved to another place; write {name}=FILE")
        if parsed.is_sweep_override() and not multirun:
            raise ConfigError(name, value, "several values are a sweep: add -m, or write a list as [a,b]")
        if name in known_groups:
            _refuse_file(name, parsed, known_groups[name])
        elif name in folders or (name not in keys(kind) and name not in groups(kind)):
            if name in groups(kind):
                example = next(key for key in keys(kind) if key.startswith(f"{name}."))
                raise ConfigError(name, value, f"this is a group of keys; set one of them, such as {example}")
            if name in folders:
                raise ConfigError(
                    name, value, f"`megapar {command}` has no such group; it has {', '.join(known_groups)}"
                )
            raise _unknown(command, name, value, list(known_groups))
        if parsed.is_add():
            raise ConfigError("+" + name, value, f"{name} exists already; leave out the +")


def _unknown(command: str, name: str, value: str, known_groups: list[str]) -> ConfigError:
    kind = commands()[command].config
    similar = [group for group in known_groups if _similar(name, group)]
    if similar and nearest(name, kind) is None:
        return ConfigError(name, value, f"unknown key; did you mean {similar[0]}?")
    return unknown_key(kind, name, value, command)


def _refuse_file(group: str, parsed: Any, known: list[str]) -> None:
    if parsed.is_sweep_override():
        listed = parsed.is_discrete_sweep() and "GLOB" not in parsed.value_type.name
        chosen = list(parsed.sweep_string_iterator()) if listed else []
    else:
        value = parsed.value()
        chosen = value if isinstance(value, list) else [value]
    for name in chosen:
        if name is None or name == "null" or str(name) in known or (group == LAYOUTS and is_layout(str(name))):
            continue
        if group == MODEL and is_model_path(str(name)):
            continue
        near = [f for f in known if _similar(str(name), f)]
        hint = f"did you mean {near[0]}? " if near else ""
        others = {LAYOUTS: ", or write a layout such as tp2pp2dp2", MODEL: ", or give a folder or a .yaml file"}
        more = others.get(group, "")
        there = Experiments.here(CONF).listing() if group == EXPERIMENT else f"conf/{group}/ has {', '.join(known)}"
        raise ConfigError(group, name, f"no such file; {hint}{there}{more}")


def _parsed(overrides: list[str]) -> list[Any]:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser, parsed = OverridesParser.create(), []
    for text in overrides:
        if text.startswith("-"):
            raise UserError(f"{text}: unknown option; `megapar --help` lists them")
        if "=" not in text and not text.startswith("~"):
            raise UserError(f"{text}: not an override; write key=value")
        try:
            parsed.append(parser.parse_override(text))
        except HydraException as error:
            problem = str(error).splitlines()[0]
            hint = """put special characters in quotes: key='"text"'"""
            raise UserError(f"{text}: not readable as key=value ({problem}); {hint}") from None
    return parsed


class one_line_errors:
    """Context that turns what Hydra and OmegaConf raise into a UserError of one line."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        from hydra.errors import HydraException
        from omegaconf.errors import OmegaConfBaseException

        if isinstance(error, HydraException | OmegaConfBaseException):
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            key = getattr(error, "full_key", None)
            raise UserError((f"{key}: " if key else "") + lines[0]) from None


def _similar(a: str, b: str) -> bool:
    import difflib

    return difflib.SequenceMatcher(None, a, b).ratio() >= 0.7
