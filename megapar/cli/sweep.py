"""Sweeps: `megapar train -m parallel=tp2,pp2 optim.lr=1e-3,3e-3`, through Hydra's own multirun.

Hydra's sweeper and launcher plugins decide which points run and where; each point is an ordinary run with its own
ranks. A point's folder is named by a hash of its overrides and a ledger keeps what became of it; the sweep's folder has
a hash of its points in its name. So the same command goes on where it stopped: points that are done stay, and an
interrupted one goes on from its checkpoint.
"""

import contextlib
import glob
import hashlib
import os
import re
import sys
import time
import traceback
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megapar.cli.command import Call
from megapar.cli.commands import train
from megapar.cli.compose import (
    MODEL,
    Overrides,
    compose,
    model_paths,
    one_line_errors,
    read,
    refuse_unknown,
    register,
    with_names,
)
from megapar.cli.finish import check_early
from megapar.cli.ledger import Ledger, State
from megapar.cli.output import say, show
from megapar.cli.table import as_csv, results, table
from megapar.config import ConfigError, UserError
from megapar.files import write_atomic
from megapar.launch import rundir
from megapar.launch.failure import RankFailure
from megapar.launch.machine import num_gpus

FINISHED = "sweep.csv"  # the table, written when every point is done
QUIET = {
    "hydra.output_subdir": "null",  # no .hydra folders: a point's run directory has all of it
    "hydra/hydra_logging": "disabled",
    "hydra/job_logging": "disabled",
    "hydra.job.chdir": "false",
    "hydra.sweep.subdir": ".",
}


@dataclass(frozen=True)
class Point:
    """What Hydra calls for each point, in this process or, with a launcher plugin, in another one."""

    parent: str  # folder of the sweep
    verbatim: dict[str, str]  # overrides that Hydra does not see
    call: str  # id of this start of the sweep
    pid: int  # process that started the sweep
    entry: str | None
    models: dict[str, str]  # paths of models by what Hydra knows them by

    def __call__(self, composed: Any) -> float:
        """Run one point, or skip it when it is done. Returns its final loss for sweepers that search; NaN: failed."""
        from hydra.core.hydra_config import HydraConfig

        paths = {f"{MODEL}={name}": f"{MODEL}={path}" for name, path in self.models.items()}
        overrides = Overrides([paths.get(text, text) for text in HydraConfig.get().overrides.task], self.verbatim)
        point = point_id(overrides)
        folder, ledger = Path(self.parent) / point, Ledger(Path(self.parent))
        about = {"overrides": overrides.as_list(), "call": self.call}
        with contextlib.ExitStack() as claims:
            try:
                claims.enter_context(rundir.claimed(folder))
            except rundir.InUse:
                say(f"point {point}: running in another process, left to it")
                return float("nan")
            before = ledger.latest().get(point, {})
            ledger.append(point, "running", **about)
            start = time.monotonic()
            state, error, ran = self._run(composed, overrides, folder)
            if before.get("state") == state == "done" and not ran:
                details = {"seconds": before.get("seconds"), "skipped": True}
            else:
                details = {"seconds": round(time.monotonic() - start, 1)}
            ledger.append(point, state, **about, **details, **({"error": str(error)} if error else {}))
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise error
            return objective(folder) if state == "done" else float("nan")

    def _run(self, composed: Any, overrides: Overrides, folder: Path) -> tuple[State, str | BaseException | None, bool]:
        """Run a point that is not done: its state, what failed in one line or what interrupted it, and whether it ran.

        Whether it is done its folder says, and not the ledger: what it was made from may have changed.
        """
        from omegaconf import OmegaConf

        say(f"point {folder.name}: {' '.join(overrides.as_list())}")
        ran = False
        try:
            with one_line_errors():
                plain: Any = OmegaConf.to_container(composed, resolve=True)
            own = {"run.dir": str(folder), "logger.wandb.group": Path(self.parent).resolve().name}
            config = read("train", plain, own | self.verbatim | {"run.dir": str(folder)})
            quiet = os.getpid() != self.pid  # side by side, progress bars would overwrite each other
            ran = train.train(config, Call(overrides.as_list(), self.entry), None, quiet)
        except (UserError, RankFailure) as error:
            say(str(error))
            return "failed", str(error).splitlines()[-1], True
        except (KeyboardInterrupt, SystemExit) as interruption:
            return "interrupted", interruption, True
        except Exception as error:
            traceback.print_exc()
            return "failed", f"{type(error).__name__}: {error}".splitlines()[0], True
        return "done", None, ran


def sweep(overrides: Overrides, entry: str | None = None) -> int:
    """Run every point of a sweep that is not done yet. Returns the exit code: 1 when a point failed."""
    verbatim = dict(overrides.verbatim)
    refuse_unknown("train", overrides, multirun=True)
    if "out" in verbatim:
        raise ConfigError(
            "out", verbatim["out"], "every point would write this file; leave it out, each has summary.json"
        )
    parent = verbatim.pop("run.dir", None)
    points = check_points(Overrides(overrides.hydra, verbatim))
    folder = Path(parent).expanduser() if parent else own_folder(Overrides(overrides.hydra, verbatim), points)
    _make(folder)
    before = Ledger(folder).latest().values()
    done = sum(row["state"] == "done" for row in before)
    say(f"sweep: {folder}" + (f" goes on: {done} of {len(points or before)} points are done" if before else ""))
    point = Point(str(folder), verbatim, uuid.uuid4().hex[:8], os.getpid(), entry, model_paths(overrides.hydra))
    arguments = [
        f"{key}={value}" for key, value in QUIET.items() if not any(a.startswith(key) for a in overrides.hydra)
    ]
    arguments += [f"hydra.sweep.dir={_quoted(str(folder))}", *overrides.hydra]
    try:
        _multirun(point, arguments)
    except KeyboardInterrupt as interruption:
        raise type(interruption)(train.command_line(overrides.as_list(), str(folder), "-m")) from None
    everything = Ledger(folder).latest()
    if len(everything) >= len(points or []) and all(row["state"] == "done" for row in everything.values()):
        write_atomic(folder / FINISHED, as_csv(folder, everything))
    rows = {name: row for name, row in Ledger(folder).latest().items() if row.get("call") == point.call}
    show(table(folder, rows))
    return 0 if rows and all(row["state"] == "done" for row in rows.values()) else 1


def point_id(overrides: Overrides) -> str:
    """Name of a point's folder: the same for the same overrides in any order."""
    return hashlib.sha256("\n".join(sorted(overrides.as_list())).encode()).hexdigest()[:10]


def own_folder(overrides: Overrides, points: list[list[str]] | None) -> Path:
    """The newest folder of this very sweep that is not finished, or a new one.

    points: that it has, where they are known
    """
    if points is None:
        texts = [text for text in overrides.as_list() if not text.startswith(("hydra/launcher", "hydra.launcher"))]
    else:
        texts = [point_id(Overrides(point, overrides.verbatim)) for point in points]
    key = hashlib.sha256("\n".join(sorted(texts)).encode()).hexdigest()[:10]
    name = f"{key}-{overrides.verbatim.get('run.name', 'run').replace('/', '-')}-sweep"
    for folder in sorted(Path("runs").glob(f"*-{glob.escape(name)}*"), reverse=True):
        if not (folder / FINISHED).exists():
            return folder
        say(f"sweep: the same one is finished in {folder}")
        break
    return rundir.default_folder(name)


def check_points(overrides: Overrides) -> list[list[str]] | None:
    """Refuse the sweep when one of its points can't run, before the first starts. Returns the points' overrides.

    Only for Hydra's own sweeper, which runs every combination; what another sweeper will choose is not known yet: None.
    """
    if any(text.startswith("hydra/sweeper=") for text in overrides.hydra):
        return None
    gpus, points = num_gpus(), _combinations([text for text in overrides.hydra if not text.startswith("hydra")])
    for point in points:
        try:
            check_early(compose("train", Overrides(point, overrides.verbatim)), gpus)
        except UserError as error:
            raise UserError(f"{error} (in the point {' '.join(point)})") from None
    return points


def objective(folder: Path) -> float:
    """What a searching sweeper minimises: the validation loss, else the training loss; NaN without either."""
    found = results(folder)
    value = found["loss"] if found["val_loss"] is None else found["val_loss"]
    return float("nan") if value is None else float(value)


def _combinations(overrides: list[str]) -> list[list[str]]:
    import hydra
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    with one_line_errors(), hydra.initialize_config_module("megapar.conf", version_base="1.3"):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        return BasicSweeper.split_arguments(parser.parse_overrides(overrides), max_batch_size=None)[0]


def _multirun(point: Point, arguments: list[str]) -> None:
    import hydra

    register(arguments)
    with one_line_errors(), _as_hydra_program(["megapar", "--multirun", *map(with_names, arguments)]):
        hydra.main(config_path="pkg://megapar.conf", config_name="train", version_base="1.3")(point)()


@contextlib.contextmanager
def _as_hydra_program(argv: list[str]) -> Iterator[None]:
    """hydra.main reads sys.argv, and prints and exits by itself unless HYDRA_FULL_ERROR tells it to raise."""
    kept_argv, kept_env = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = argv, "1"
    try:
        yield
    finally:
        sys.argv = kept_argv
        if kept_env is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = kept_env


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("run.dir", folder, f"can't be made ({error.strerror}); choose another folder") from None
    if (folder / "config.yaml").exists():
        raise ConfigError(
            "run.dir", folder, "is a single run; under -m run.dir is the folder of the sweep, choose another"
        )


def _quoted(text: str) -> str:
    """Text as a quoted string of Hydra's grammar, `${` in it as no interpolation."""
    text = re.sub(r"(\\*)(\$\{)", lambda found: 2 * found[1] + "\\" + found[2], text)
    text = re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), text)
    return f"'{text}'"
