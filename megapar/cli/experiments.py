"""Where `experiment=NAME` is found: `conf/experiment/NAME.yaml`, or `experiments/NAME/experiment.yaml`.

The second in the current folder and in the checkout that megapar is installed from. No place wins over another: a name
that several have, with different content, is refused.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from megapar.config.errors import ConfigError, UserError
from megapar.config.experiments import experiment_folders

EXPERIMENT = "experiment"  # the group
FILE = "experiment.yaml"


@dataclass(frozen=True)
class Experiments:
    """The experiments of this moment.

    conf: those of conf/, by name. folders: those of each experiments/ folder, by what a message calls that folder
    """

    conf: dict[str, Path]
    folders: dict[str, dict[str, Path]]

    @classmethod
    def here(cls, conf: Path) -> "Experiments":
        """Those that the current folder, the checkout and the folder `conf` have."""
        folders = experiment_folders().items()
        found = {label: {path.parent.name: path for path in at.glob(f"*/{FILE}")} for label, at in folders}
        files = {path.stem: path for path in (conf / EXPERIMENT).glob("*.yaml")}
        return cls(files, {label: there for label, there in found.items() if there})

    def names(self) -> list[str]:
        """Every name."""
        return sorted({name for there in (self.conf, *self.folders.values()) for name in there})

    def listing(self) -> str:
        """What each place has, for a refusal."""
        places = {"conf/experiment/": self.conf} | self.folders
        return "; ".join(f"{label} has {', '.join(sorted(there))}" for label, there in places.items())

    def paths(self, name: str) -> list[Path]:
        """The files of an experiment, the one in conf/ first."""
        return [there[name] for there in (self.conf, *self.folders.values()) if name in there]

    def texts(self) -> list[str]:
        """What is in all of the files."""
        return [_text(path) for name in self.names() for path in self.paths(name)]

    def outside(self, overrides: Iterable[str]) -> dict[str, dict[Any, Any]]:
        """What experiments that are not in conf/ say, by name.

        Raises UserError where one that the overrides name can't be read, or is there twice. Others like that are left
        out: they must not keep anybody from a run of something else.
        """
        chosen = [text for text in overrides if text.startswith(f"{EXPERIMENT}=")]
        everything = any("glob(" in text for text in chosen)
        named = {word for text in chosen for word in re.findall(r"[^\s,=()\[\]'\"]+", text)}
        found = {}
        for name in self.names():
            try:
                self._refuse_twice(name)
                if name not in self.conf:
                    [path, *_] = self.paths(name)
                    found[name] = _parsed(path, _text(path))
            except UserError:
                if everything or name in named:
                    raise
        return found

    def _refuse_twice(self, name: str) -> None:
        first, *others = self.paths(name)
        for path in others:
            if _text(path) != _text(first):
                raise ConfigError(EXPERIMENT, name, f"{first} and {path} differ; rename one of them")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


@cache
def _parsed(path: Path, text: str) -> dict[Any, Any]:
    """A file's content as Hydra reads the files of conf/. Raises UserError."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        content = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not an experiment; write the keys that it sets, as conf/experiment/demo.yaml does")
    return content
