"""Weights & Biases: `logger.wandb.mode`."""

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megapar.config.errors import ConfigError
from megapar.config.file import to_dict
from megapar.config.schema import TrainConfig
from megapar.files import write_atomic
from megapar.train.sinks.sink import Sink

ID = "wandb-id"  # in the run directory: the id that a run keeps when it goes on


class Wandb(Sink):
    """A run of the run directory's name, in the sweep's group, with the resolved config."""

    name = "wandb"
    leaves = ("wandb", ID)

    @classmethod
    def wanted(cls, config: TrainConfig) -> bool:
        return config.logger.wandb.mode != "disabled"

    @classmethod
    def refuse(cls, config: TrainConfig) -> None:
        """If wandb is to upload and finds no key."""
        if config.logger.wandb.mode != "online":
            return
        import wandb
        from wandb.sdk import wandb_setup
        from wandb.sdk.lib import wbauth

        host = wandb_setup.singleton().settings.base_url
        remedy = "set WANDB_API_KEY or run `wandb login`, or use offline or disabled"
        try:
            key = wbauth.authenticate_session(host=host, source="megapar", prompt=False, update_session=False)
        except wandb.errors.Error as error:
            raise ConfigError("logger.wandb.mode", "online", f"{str(error).splitlines()[0]}; {remedy}") from None
        if key is None:
            raise ConfigError("logger.wandb.mode", "online", f"there is no key for {host}; {remedy}")

    def start(self) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        assert self.config.run.dir is not None
        folder, options = Path(self.config.run.dir), self.config.logger.wandb
        with _temporary_files_in(folder):
            # What is given here comes before variables such as WANDB_RUN_ID, which a sweep's points would share.
            self._run = wandb.init(
                project=options.project,
                group=options.group,
                name=folder.resolve().name,
                id=run_id(folder),
                resume="allow",
                config=to_dict(self.config),
                dir=folder,
                mode=options.mode,
                settings=wandb.Settings(console="off", x_disable_stats=True, x_disable_meta=True),
            )

    def write(self, row: Mapping[str, Any]) -> None:
        self._run.log(dict(row), step=row["step"])

    def finish(self) -> None:
        self._run.finish()


def run_id(folder: Path) -> str:
    """The id of a run: made once, of what no other run has, and kept in its directory."""
    path = folder / ID
    if not path.exists():
        write_atomic(path, hashlib.sha256(os.urandom(16)).hexdigest()[:12] + "\n")
    return path.read_text(encoding="utf-8").strip()


@contextmanager
def _temporary_files_in(folder: Path) -> Iterator[None]:
    """What wandb writes for its own service stays with the run, also if the run is killed."""
    (folder / "wandb").mkdir(exist_ok=True)
    kept, tempfile.tempdir = tempfile.tempdir, str(folder / "wandb")
    try:
        yield
    finally:
        tempfile.tempdir = kept


SINK = Wandb
