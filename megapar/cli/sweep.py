"""Sweeps: `megapar train -m parallel=tp2,pp2 optim.lr=1e-3,3e-3`, through Hydra's own multirun.

Hydra's sweeper and launcher plugins decide which points run and where; each point is an ordinary run with its own
ranks. A point's folder is named by a hash of its overrides and a ledger keeps what became of it, so the same command
with the same run.dir goes on where it stopped.
"""

import contextlib
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
from megapar.cli.compose import Overrides, compose, one_line_errors, read, refuse_unknown, register
from megapar.cli.finish import check_early
from megapar.cli.ledger import Ledger, State
from megapar.cli.output import say
from megapar.config import ConfigError, UserError
from megapar.launch import rundir
from megapar.launch.failure import RankFailure
from megapar.launch.local import launch
from megapar.launch.machine import num_gpus

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

    def __call__(self, composed: Any) -> float:
        """Run one point, or skip it when it is done. Returns its final loss for sweepers that search; NaN: failed."""
        from hydra.core.hydra_config import HydraConfig

        overrides = Overrides(list(HydraConfig.get().overrides.task), self.verbatim)
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
            if before.get("state") == "done" and (folder / "summary.json").exists():
                ledger.append(point, "done", **about, seconds=before.get("seconds"), skipped=True)
                return objective(folder)
            ledger.append(point, "running", **about)
            start = time.monotonic()
            state, error = self._run(composed, overrides, folder)
            seconds = round(time.monotonic() - start, 1)
            ledger.append(point, state, **about, seconds=seconds, **({"error": str(error)} if error else {}))
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise error
            return objective(folder) if state == "done" else float("nan")

    def _run(self, composed: Any, overrides: Overrides, folder: Path) -> tuple[State, str | BaseException | None]:
        """Run a point: its state, and what failed in one line or what interrupted it."""
        from omegaconf import OmegaConf

        say(f"point {folder.name}: {' '.join(overrides.as_list())}")
        try:
            with one_line_errors():
                plain: Any = OmegaConf.to_container(composed, resolve=True)
            own = {"run.dir": str(folder), "logger.wandb.group": Path(self.parent).resolve().name}
            config = read("train", plain, own | self.verbatim | {"run.dir": str(folder)})
            job = train.plan(config, Call(overrides.as_list(), self.entry), None)
            launch(job, quiet=os.getpid() != self.pid)  # side by side, progress bars would overwrite each other
            train.draw(job)
        except (UserError, RankFailure) as error:
            say(str(error))
            return "failed", str(error).splitlines()[-1]
        except (KeyboardInterrupt, SystemExit) as interruption:
            return "interrupted", interruption
        except Exception as error:
            traceback.print_exc()
            return "failed", f"{type(error).__name__}: {error}".splitlines()[0]
        return "done", None


def sweep(overrides: Overrides, entry: str | None = None) -> int:
    """Run every point of a sweep that is not done yet. Returns the exit code: 1 when a point failed."""
    verbatim = dict(overrides.verbatim)
    refuse_unknown("train", overrides, multirun=True)
    if "out" in verbatim:
        raise ConfigError(
            "out", verbatim["out"], "every point would write this file; leave it out, each has summary.json"
        )
    parent = verbatim.pop("run.dir", None)
    check_points(Overrides(overrides.hydra, verbatim))
    folder = Path(parent).expanduser() if parent else rundir.default_folder(verbatim.get("run.name", "run") + "-sweep")
    _make(folder)
    say(f"sweep: {folder}")
    point = Point(str(folder), verbatim, uuid.uuid4().hex[:8], os.getpid(), entry)
    arguments = [
        f"{key}={value}" for key, value in QUIET.items() if not any(a.startswith(key) for a in overrides.hydra)
    ]
    arguments += [f"hydra.sweep.dir={_quoted(str(folder))}", *overrides.hydra]
    _multirun(point, arguments)
    rows = {name: row for name, row in Ledger(folder).latest().items() if row.get("call") == point.call}
    print(table(folder, rows))
    return 0 if rows and all(row["state"] == "done" for row in rows.values()) else 1


def point_id(overrides: Overrides) -> str:
    """Name of a point's folder: the same for the same overrides in any order."""
    return hashlib.sha256("\n".join(sorted(overrides.as_list())).encode()).hexdigest()[:10]


def check_points(overrides: Overrides) -> None:
    """Refuse the sweep when one of its points can't run, before the first starts.

    Only for Hydra's own sweeper, which runs every combination; what another sweeper will choose is not known yet.
    """
    if any(text.startswith("hydra/sweeper=") for text in overrides.hydra):
        return
    gpus = num_gpus()
    for point in _combinations([text for text in overrides.hydra if not text.startswith("hydra")]):
        try:
            check_early(compose("train", Overrides(point, overrides.verbatim)), gpus)
        except UserError as error:
            raise UserError(f"{error} (in the point {' '.join(point)})") from None


def results(folder: Path) -> dict[str, Any]:
    """What the table shows of a finished point, from its summary.json: loss, val_loss (the last), tokens_per_s."""
    summary = rundir.read_json(folder / "summary.json")
    evaluations = summary.get("evaluations") or [{}]
    found = {"loss": summary.get("loss"), "val_loss": evaluations[-1].get("val_loss")}
    return found | {"tokens_per_s": summary.get("tokens_per_s")}


def objective(folder: Path) -> float:
    """What a searching sweeper minimises: the validation loss, else the training loss; NaN without either."""
    found = results(folder)
    value = found["loss"] if found["val_loss"] is None else found["val_loss"]
    return float("nan") if value is None else float(value)


def table(folder: Path, rows: dict[str, dict[str, Any]]) -> str:
    """The points of a sweep, one a line: state, final loss, speed, seconds, what sets it apart."""
    common = set.intersection(*(set(row["overrides"]) for row in rows.values())) if len(rows) > 1 else set()
    lines = [f"{'point':<10}  {'state':<11}  {'loss':>8}  {'val_loss':>8}  {'tokens/s':>9}  {'seconds':>7}  overrides"]
    for name, row in rows.items():
        found = results(folder / name) if row["state"] == "done" else {}
        numbers = [
            _number(found.get("loss"), ".4f", 8),
            _number(found.get("val_loss"), ".4f", 8),
            _number(found.get("tokens_per_s"), ",.0f", 9),
            _number(row.get("seconds"), ".1f", 7),
        ]
        own = " ".join(override for override in row["overrides"] if override not in common)
        lines.append(f"{name:<10}  {row['state']:<11}  {'  '.join(numbers)}  {own}")
        if row.get("error"):
            lines.append(f"{'':<10}  {row['error']}")
    counts = {state: sum(row["state"] == state for row in rows.values()) for state in ("done", "failed", "interrupted")}
    skipped = sum(bool(row.get("skipped")) for row in rows.values())
    total = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    return "\n".join(
        [*lines, f"{total}{f' ({skipped} of them before)' if skipped else ''}; ledger: {folder}/ledger.jsonl"]
    )


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
    with one_line_errors(), _as_hydra_program(["megapar", "--multirun", *arguments]):
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


def _number(value: Any, form: str, width: int) -> str:
    return f"{value:>{width}{form}}" if isinstance(value, int | float) else f"{'-':>{width}}"
