"""The run directory: made once, by the process that composed the configuration, and held by it until the run ends."""

import errno
import fcntl
import itertools
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO, Any, TypeVar

import yaml

from megapar.config.errors import ConfigError, UserError, show
from megapar.config.file import dump, load
from megapar.config.keys import changed, keys, value_of
from megapar.config.schema import TrainConfig
from megapar.files import write_atomic
from megapar.launch.machine import environment

T = TypeVar("T", bound=TrainConfig)

METRICS = "metrics.jsonl"
SUMMARY = "summary.json"  # written last: a run that has it is finished
RESULTS = (SUMMARY, "run.svg", "verify.json")
RESTARTS = "restarts.jsonl"  # a line per failure that the run went on after
TRACED = ("trace.json", "costs.json")
FACTS = ("config.yaml", "overrides.yaml", "environment.json")
FOLDERS = ("logs", "checkpoints")
ASIDE = "before-"  # what the folder begins with that an earlier run of the directory is moved to
ANOTHER = "choose another run.dir or remove that folder"
REFERENCE = "reference-"  # what verify's folder for the one-process run begins with


class InUse(ConfigError):
    """Another process is writing to the run directory."""


def create(config: T, overrides: list[str], backends: dict[str, str], claims: ExitStack | None) -> T:
    """Make the run directory of a resolved config that starts anew there: `claim`, `clear` and `write`.

    Raises ConfigError for one that holds another configuration, that is in use, or that can't be written.
    """
    config = claim(config, claims)
    refuse_other_config(config)
    clear(Path(str(config.run.dir)), None, config.train.trace)
    write(config, overrides, backends)
    return config


def claim(config: T, claims: ExitStack | None) -> T:
    """Make a config's run directory and hold it. Returns the config with `run.dir` filled in.

    claims: holds the directory until it is closed, see `claimed`; None: the caller holds it already

    Raises ConfigError for one that is in use, or that can't be written.
    """
    if config.run.dir is None:
        config = changed(config, {"run.dir": str(default_folder(config.run.name))})
    folder = Path(str(config.run.dir))
    make_writable(folder)
    if claims is not None:
        claims.enter_context(claimed(folder))
    return config


def write(config: TrainConfig, overrides: list[str], backends: dict[str, str]) -> None:
    """Write config.yaml, overrides.yaml and environment.json into a run directory. Raises UserError."""
    folder = Path(str(config.run.dir))
    for name in FOLDERS:
        make_writable(folder / name)
    write_atomic(folder / "config.yaml", dump(config))
    write_atomic(folder / "overrides.yaml", yaml.safe_dump(overrides, allow_unicode=True, width=1 << 30))
    facts = environment(config.train.device, backends)
    write_atomic(folder / "environment.json", json.dumps(facts, indent=2) + "\n")


def refuse_other_config(config: TrainConfig) -> None:
    """Raise ConfigError where the config's `run.dir` exists and holds another configuration."""
    path = Path(str(config.run.dir)) / "config.yaml"
    if config.run.dir is None or not path.exists():
        return
    try:
        there = load(type(config), path)
    except UserError as error:
        raise ConfigError("run.dir", config.run.dir, f"holds a run of another kind ({error}); {ANOTHER}") from None
    old = {key: value_of(there, key) for key, facts in keys(type(config)).items() if facts.identity}
    new = {key: value_of(config, key) for key in old}
    different = [f"{key} was {show(old[key])}, now {show(new[key])}" for key in old if old[key] != new[key]]
    if different:
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        problem = f"holds a run of another configuration ({', '.join(different[:3])}{more}); {ANOTHER}"
        raise ConfigError("run.dir", config.run.dir, problem)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold a run directory, made where it is missing, against other processes; this one's end releases it too.

    Raises InUse where another one holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            _lock(file)
        except BlockingIOError:
            problem = "another run is writing there; wait for its end, or choose another folder"
            raise InUse("run.dir", folder, problem) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):  # a file system without locks
                raise
        yield


def is_held(folder: Path) -> bool:
    """Whether a process holds a run directory. Writes nothing."""
    try:
        with open(folder / ".lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _lock(file: IO[str]) -> None:
    """Lock a file. Tries twice: who only looks (`is_held`) has it for a moment. Raises OSError."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        time.sleep(0.1)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def move_aside(folder: Path, after: int | None = None) -> None:
    """Move what a run has left in its directory to before-1, before-2, ... in there. Other files stay.

    after: a step: only the later checkpoints and the run's results, with a copy of the metrics
    """
    from megapar.checkpoint.format import STEP_FOLDER  # torch: not for every refusal
    from megapar.data.tokenizer.files import NAMES
    from megapar.train.sinks import sink_kinds

    number = next(number for number in itertools.count(1) if not (folder / f"{ASIDE}{number}").exists())
    aside = folder / f"{ASIDE}{number}"
    make_writable(aside)
    if after is None:
        names = [METRICS, RESTARTS, *RESULTS, *TRACED, *FACTS, *NAMES, *FOLDERS]
        names += [name for sink in sink_kinds() for name in sink.leaves]
    else:
        (aside / "checkpoints").mkdir()
        steps = (path for path in (folder / "checkpoints").glob("step-*") if STEP_FOLDER.fullmatch(path.name))
        names = [f"checkpoints/{path.name}" for path in steps if int(path.name[5:]) > after]
        names += [name for name in RESULTS if (folder / name).exists()]
        if (folder / METRICS).exists():
            shutil.copyfile(folder / METRICS, aside / METRICS)
    for name in names:
        if (folder / name).exists():
            try:
                shutil.move(folder / name, aside / name)  # also to another device, where checkpoints/ is a link to one
            except OSError as error:
                problem = f"can't be moved to {aside} ({error.strerror}); make room, or {ANOTHER}"
                raise ConfigError("run.dir", folder / name, problem) from None


def clear(folder: Path, going_on_after: int | None, trace: list[int] | None) -> str:
    """Remove what an earlier start of the run wrote, so that each step is there once. Checkpoints stay.

    Returns which steps the metrics lack of those that are not taken again, in words; empty: none, or it is not known.

    going_on_after: steps of which the metrics stay, with the logs; None: the run starts anew
    trace: the steps to trace; where all of them are done, what they left stays
    """
    missing, stale = "", [folder / name for name in RESULTS]
    if going_on_after is None or trace is None or trace[1] > going_on_after:
        stale += [folder / name for name in TRACED]
    if going_on_after is None:
        stale += [folder / METRICS, folder / RESTARTS, *(folder / "logs").glob("rank-*.log")]
    elif (folder / METRICS).exists():
        rows = list(_rows(folder / METRICS, going_on_after))
        write_atomic(folder / METRICS, "".join(f"{line}\n" for line, _ in rows))
        missing = _missing([row["step"] for _, row in rows if "loss" in row], going_on_after)
    for path in stale:
        path.unlink(missing_ok=True)
    for left_over in folder.glob(f"{REFERENCE}*"):
        shutil.rmtree(left_over, ignore_errors=True)
    return missing


def _rows(path: Path, steps_done: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of metrics.jsonl, and what they say, of steps that are not taken again. What is no row, such as half a
    line that a kill has left, is passed over. Raises ConfigError."""
    try:
        text = path.read_bytes().decode(errors="replace")
    except OSError as error:
        raise ConfigError("run.dir", path, f"can't be read ({error.strerror}); remove it, or {ANOTHER}") from None
    for line in text.split("\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int and row["step"] <= steps_done:
            yield line.rstrip("\r"), row


def _missing(steps: list[int], last: int) -> str:
    """What lacks of the steps up to `last`, in words. The run may have begun behind those before the first."""
    if not steps and last:
        return f"no row of a step up to {last}"
    absent = sorted(set(range(min(steps, default=1), last + 1)) - set(steps))
    more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
    return f"no row of step {', '.join(map(str, absent[:3]))}{more}" if absent else ""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def default_folder(name: str, parent: Path = Path("runs"), key: str = "run.dir") -> Path:
    """runs/DATE-TIME-NAME, made now; a number follows where another run took that name."""
    stem = f"{datetime.now():%Y%m%d-%H%M%S}-{name.replace('/', '-')}"
    for number in range(1, 1000):
        folder = parent / (stem if number == 1 else f"{stem}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(key, folder, f"can't be made ({error.strerror}); name another with {key}=") from None
        return folder
    raise ConfigError("run.name", name, f"{parent} is full of runs of this second; use another name")


def make_writable(folder: Path, key: str = "run.dir") -> None:
    """Make a folder, or raise ConfigError where no file can be written there. key: that named it"""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        problem = f"can't be written ({error.strerror}); choose another folder"
        raise ConfigError(key, folder, problem) from None
