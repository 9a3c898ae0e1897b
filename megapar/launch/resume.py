"""How a run starts in its directory: from what it is given, anew, or where it was interrupted.

The same command typed again is the same run: it goes on from its newest checkpoint whose every file is as it was
written. What its directory holds decides, read under the directory's lock, before a rank is started.
"""

import secrets
import shutil
from collections.abc import Set
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from megapar.checkpoint import Manifest, find_checkpoint, read_manifest
from megapar.checkpoint.format import LATEST, STEP_FOLDER, UNFINISHED, latest_name, newest_first, verify_files
from megapar.checkpoint.hf.folder import is_hf_folder, open_weights
from megapar.checkpoint.load import head_anew, refuse_other_model, refuse_other_optimizer, refuse_other_order
from megapar.checkpoint.save import begin, data_hashes, finish, frozen_hashes, sync, writing
from megapar.config.errors import ConfigError, UserError, show
from megapar.config.file import load
from megapar.config.keys import keys, value_of
from megapar.config.schema import TrainConfig
from megapar.config.stages import num_stages
from megapar.files import write_atomic
from megapar.launch import rundir
from megapar.launch.copies import Copies
from megapar.optim.schedule import learning_rate
from megapar.train.metrics import rows_before

ELSEWHERE = "choose another run.dir, or train.resume=never, which moves what is there aside"
MOST = 6  # differences that are named
FROZEN = ("base", "reference")  # of a manifest's data: weights that are never trained
ORIGINS = ("load", "weights")  # keys of `checkpoint`: where a run comes from before it has state of its own


@dataclass(frozen=True)
class Start:
    """What becomes of the run directory, and where the ranks begin.

    way: new: nothing is there; anew: no checkpoint is there; aside: what is there is moved aside; on: from the newest
        checkpoint; back: from an earlier one of its own, as that was asked for or later ones are damaged: these are
        moved aside; done: there is nothing to do
    step: training steps done
    load: the checkpoint to load; None: initial values, or the weights of `checkpoint.weights`
    said: lines about it
    partition: layers per stage as the run had moved them by then (`pipeline.rebalance`); None: as the config says
    """

    way: Literal["new", "anew", "aside", "on", "back", "done"]
    step: int = 0
    load: str | None = None
    said: list[str] = field(default_factory=list)
    partition: list[int] | None = None


def decide(config: TrainConfig, copies: Copies | None = None) -> Start:
    """How a finished config starts. Only reads. Raises UserError where it can't.

    copies: the run's in memory, which count if they have done more steps than what is on disk
    """
    folder = None if config.run.dir is None else Path(config.run.dir)
    if folder is None or not _holds_run(folder):
        return _from_origin("new", config)
    if config.train.resume == "never":
        for name in ORIGINS:
            path = getattr(config.checkpoint, name)
            if path is not None and Path(path).resolve().is_relative_to(folder.resolve()):
                problem = "train.resume=never would move it aside; choose another run.dir"
                raise ConfigError(f"checkpoint.{name}", path, problem)
        return _from_origin("aside", config)
    saved = _saved(folder)
    state, damaged = _newest(folder, copies)
    asked = config.checkpoint.load
    if is_own(folder, asked) and (saved is None or asked != saved.checkpoint.load):
        start = _from_origin("back", config)
        earlier = Path(str(start.load))
        if state is None or earlier.resolve() != state.resolve():
            found = read_manifest(earlier)
            refuse_other_run(folder, config, saved, found)
            moved = _moved(found, config, saved)
            return replace(start, said=[*start.said, *_changes(config, saved)], partition=moved)
    manifest = None if state is None else read_manifest(state)
    refuse_other_run(folder, config, saved, manifest)
    if manifest is None or state is None:
        return _without_checkpoint(folder, config, saved)
    steps = config.train.steps
    if manifest.step > steps:
        problem = f"{folder} has done {manifest.step} steps already; use more, {ELSEWHERE}"
        raise ConfigError("train.steps", steps, problem)
    if manifest.step == steps and (folder / rundir.SUMMARY).exists():
        return Start("done", steps, said=_done(folder, config, saved))
    said = [f"run: {line}" for line in damaged.values()]
    later = any(int(path.name[5:]) > manifest.step for path in damaged)
    said += [f"run: what came after step {manifest.step} is moved aside"] if later else []
    said += [f"run: goes on from step {manifest.step} of {steps}, which {state} has", *_changes(config, saved)]
    return Start("back" if later else "on", manifest.step, str(state), said, _moved(manifest, config, saved))


def prepare(config: TrainConfig, start: Start) -> list[str]:
    """Make the run directory, held by the caller, ready for the start. Returns lines about what is missing there."""
    folder = Path(str(config.run.dir))
    if start.way == "aside":
        rundir.move_aside(folder)
    elif start.way == "back":
        rundir.move_aside(folder, after=start.step)
    if start.way in ("on", "back") and is_own(folder, start.load):
        write_atomic(folder / "checkpoints" / LATEST, Path(str(start.load)).name + "\n")
    missing = rundir.clear(folder, start.step if start.way in ("on", "back") else None, config.train.trace)
    return [f"run: {folder}/{rundir.METRICS}: {missing}, which has been cut or changed"] if missing else []


def keep_copy(folder: Path, copies: Copies) -> Path | None:
    """Write the newest checkpoint in memory to the run directory, where it has done more steps than any that is whole
    there. Returns where it is; None: there is none to keep. Raises UserError."""
    state, _ = _newest(folder, copies)
    if state is None or state.parent != copies.folder / "checkpoints":
        return None
    manifest, final = read_manifest(state), folder / "checkpoints" / state.name
    temporary = final.with_name(f"{final.name}{UNFINISHED}{secrets.token_hex(4)}")
    begin(final.parent, temporary)
    for name in manifest.files:
        with writing(temporary / name):
            shutil.copyfile(state / name, temporary / name)
            sync(temporary / name)
    finish(temporary, final, manifest)
    return final


def copy_summary(config: TrainConfig) -> None:
    """Give a run that is done already its `out`."""
    summary = Path(str(config.run.dir)) / rundir.SUMMARY
    if config.out is not None and Path(config.out).resolve() != summary.resolve():
        shutil.copyfile(summary, config.out)


def is_own(folder: Path, path: str | None) -> bool:
    """Whether a checkpoint to load is one of the run of this directory."""
    if path is None:
        return False
    own, there = folder.resolve(), Path(path).resolve()
    return there == own or there.is_relative_to((own / "checkpoints").resolve())


def has_checkpoint(folder: Path) -> bool:
    """Whether a run has left a checkpoint."""
    return bool(newest_first(folder / "checkpoints"))


def refuse_other_run(folder: Path, config: TrainConfig, saved: TrainConfig | None, manifest: Manifest | None) -> None:
    """Raise ConfigError where a config has other values than the run there of what must stay the same.

    saved: its config.yaml; manifest: of the checkpoint that it would go on from. Data are the same if their tokens are.
    """
    if saved is None and manifest is not None:
        refuse_other_model(manifest, config, folder)
        refuse_other_optimizer(manifest, config, folder)
        refuse_other_order(manifest, config, folder)
    if saved is None:
        return
    then, now = manifest.data if manifest is not None else {}, data_hashes(config.data.prefix)
    frozen = {kind: then[kind] for kind in FROZEN if kind in then}
    then = {kind: digest for kind, digest in then.items() if kind not in FROZEN}
    same_data = bool(now) and now == then
    same_reference = "reference" in frozen and frozen_hashes(config).get("reference") == frozen["reference"]
    different = [
        f"{key} {show(value_of(saved, key))} -> {show(value_of(config, key))}"
        for key, facts in keys(TrainConfig).items()
        if (facts.fixed or (facts.kept and not (same_data and key.startswith("data."))))
        and not (same_reference and key == "task.reference")
        and value_of(saved, key) != value_of(config, key)
    ]
    for name in ORIGINS:
        was, to = getattr(saved.checkpoint, name), getattr(config.checkpoint, name)
        if not _same_origin(folder, was, to, manifest is not None):
            different.append(f"checkpoint.{name} {show(was)} -> {show(to)}")
    if not different and then and now and not same_data:
        kind = next(kind for kind in {**now, **then} if now.get(kind) != then.get(kind))
        before, after = (f"{hashes.get(kind, 'none'):.8}" for hashes in (then, now))
        different.append(f"the {kind} of data.path={config.data.path}, by SHA-256 {before} -> {after}")
    if different:
        more = f" and {len(different) - MOST} more" if len(different) > MOST else ""
        problem = (
            f"holds a run that does not go on with other values (saved -> now): {', '.join(different[:MOST])}{more}; "
            f"use the saved ones, {ELSEWHERE}"
        )
        raise ConfigError("run.dir", folder, problem)


def _same_origin(folder: Path, was: str | None, now: str | None, has_state: bool) -> bool:
    """Whether a run came from where the config says, or needs no more to know it."""
    was, now = (None if is_own(folder, path) else path for path in (was, now))
    if was is None or now is None:
        return was == now or (now is None and has_state)
    return Path(was).resolve() == Path(now).resolve()


def _from_origin(way: Literal["new", "aside", "anew", "back"], config: TrainConfig) -> Start:
    """From `checkpoint.load`, `checkpoint.weights` or initial values. Raises UserError where that can't be."""
    said = [f"run: {config.run.dir}: what was there is moved aside"] if way == "aside" else []
    if config.checkpoint.weights is not None and is_hf_folder(config.checkpoint.weights):
        open_weights(Path(config.checkpoint.weights), config)
    elif config.checkpoint.weights is not None:
        origin = _origin("weights", config, config.checkpoint.weights)
        refuse_other_model(*origin, weights=True)
        if head_anew(origin[0], config):
            said.append(
                f"run: the last part begins anew: the weights are without one for model.output={config.model.output}"
            )
    if config.checkpoint.load is None:
        return Start(way, said=said)
    manifest, config, folder = _origin("load", config, config.checkpoint.load)
    refuse_other_model(manifest, config, folder)
    if manifest.kinds.keys() == {"weight"}:
        problem = "holds weights alone, and no optimizer's state; use checkpoint.weights, which begins at step 0"
        raise ConfigError("checkpoint.load", config.checkpoint.load, problem)
    refuse_other_optimizer(manifest, config, folder)
    refuse_other_order(manifest, config, folder)
    if manifest.step >= config.train.steps:
        problem = f"{folder} has done {manifest.step} steps already; use more, or an earlier checkpoint"
        raise ConfigError("train.steps", config.train.steps, problem)
    if way == "back":
        said = [f"run: goes back to step {manifest.step}; what came after it is moved aside"]
    return Start(way, manifest.step, str(folder), said)


def _origin(name: str, config: TrainConfig, path: str) -> tuple[Manifest, TrainConfig, Path]:
    try:
        folder = find_checkpoint(path)
        return read_manifest(folder), config, folder
    except UserError as error:
        raise ConfigError(f"checkpoint.{name}", path, str(error)) from None


def _without_checkpoint(folder: Path, config: TrainConfig, saved: TrainConfig | None) -> Start:
    """A run that was interrupted before its first checkpoint, or whose checkpoints were removed."""
    if (folder / rundir.SUMMARY).exists() and saved is not None and _has_row(folder, saved.train.steps):
        if saved.train.steps == config.train.steps:
            return Start("done", config.train.steps, said=_done(folder, config, saved))
        problem = f"{folder} is finished and has no checkpoint left to go on from; {ELSEWHERE}"
        raise ConfigError("train.steps", config.train.steps, problem)
    if STEP_FOLDER.fullmatch(newest := latest_name(folder / "checkpoints")):
        problem = f"its checkpoints are gone, though checkpoints/{LATEST} names {newest}; bring them back, {ELSEWHERE}"
        raise ConfigError("run.dir", folder, problem)
    start = _from_origin("anew", config)
    said = f"run: {folder}: was interrupted before its first checkpoint, so it starts anew"
    return Start("anew", start.step, start.load, [said, *_changes(config, saved)])


def _has_row(folder: Path, step: int) -> bool:
    """Whether the metrics have this step."""
    try:
        return any(row["step"] == step for row in rows_before(folder, step, "loss"))
    except (OSError, ValueError, KeyError, TypeError):  # none, or half a line, as a kill leaves it
        return False


def _holds_run(folder: Path) -> bool:
    return (folder / "config.yaml").exists() or has_checkpoint(folder)


def _saved(folder: Path) -> TrainConfig | None:
    """The config of the run there; None where only its checkpoints are."""
    path = folder / "config.yaml"
    if not path.exists():
        return None
    try:
        return load(TrainConfig, path)
    except UserError as error:
        problem = f"holds a run of another kind ({error}); {rundir.ANOTHER}"
        if has_checkpoint(folder):
            problem = f"has checkpoints, and a config.yaml that can't be read ({error}); "
            problem += "remove that file alone, and the run goes on from them, if nothing else has changed"
        raise ConfigError("run.dir", folder, problem) from None


def _newest(folder: Path, copies: Copies | None) -> tuple[Path | None, dict[Path, str]]:
    """The newest on disk or in memory, and what is wrong with those on disk before it. Raises ConfigError."""
    in_memory = None
    elsewhere = {} if copies is None else copies.elsewhere
    for path in [] if copies is None else newest_first(copies.folder / "checkpoints"):
        with suppress(UserError):
            _verify(path, elsewhere.get(path.name, frozenset()))
            in_memory = path
            break
    if in_memory is None:
        return _newest_on_disk(folder)
    damaged: dict[Path, str] = {}
    for path in newest_first(folder / "checkpoints"):
        if int(path.name[5:]) < int(in_memory.name[5:]):
            break  # no more is read of these
        try:
            _verify(path)
            return path, damaged
        except UserError as error:
            damaged[path] = str(error)
    return in_memory, damaged


def _newest_on_disk(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint whose every file has its SHA-256, None where there is no checkpoint; and what is wrong with
    those before it, a line each. Raises ConfigError where all are damaged.
    """
    damaged: dict[Path, str] = {}
    for path in newest_first(folder / "checkpoints"):
        try:
            _verify(path)
            return path, damaged
        except UserError as error:
            damaged[path] = str(error)
    if not damaged:
        return None, damaged
    problem = f"has no whole checkpoint to go on from ({next(iter(damaged.values()))}); {ELSEWHERE}"
    raise ConfigError("run.dir", folder, problem)


_verified: set[tuple[object, ...]] = set()


def _verify(path: Path, elsewhere: Set[str] = frozenset()) -> None:
    """Hash the files of a checkpoint, unless this process has hashed them and they have not changed since: a start is
    decided twice, without and with the directory's lock. elsewhere: files that another host has. Raises UserError."""
    manifest = read_manifest(path)
    names = [name for name in manifest.files if name not in elsewhere]
    stamps = []
    for name in names:
        with suppress(OSError):
            facts = (path / name).lstat()
            stamps.append((name, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns))
    seen = (path.resolve(), repr(manifest.files), *stamps)
    if seen not in _verified:
        verify_files(path, manifest, names)
        _verified.add(seen)


def _moved(manifest: Manifest, config: TrainConfig, saved: TrainConfig | None) -> list[int] | None:
    """Layers per stage where they had moved by measured times, if the config still has the partition from before."""
    partition = manifest.config.get("pipeline", {}).get("partition")
    if not config.pipeline.rebalance or saved is None or saved.pipeline.partition != config.pipeline.partition:
        return None
    if not isinstance(partition, list) or partition == config.pipeline.partition:
        return None
    return partition if len(partition) == num_stages(config) else None


def _changes(config: TrainConfig, saved: TrainConfig | None) -> list[str]:
    """What has changed since the run's last start and may: one line of keys, one of the learning rate's new end."""
    if saved is None:
        return []
    origins = [f"checkpoint.{name}" for name in ORIGINS]
    different = [
        f"{key} {show(was)} -> {show(now)}"
        for key, facts in keys(TrainConfig).items()
        if facts.identity and key not in origins and (was := value_of(saved, key)) != (now := value_of(config, key))
    ]
    said = [f"run: changed since: {', '.join(different)}"] if different else []
    old, new = saved.train.steps, config.train.steps
    if old != new:
        ends = [learning_rate(one.optim, one.train.steps, one.train.steps) for one in (saved, config)]
        said.append(
            f"run: the learning rate's curve now ends at step {new} with {ends[1]:.3g}; it ended at step {old} with "
            f"{ends[0]:.3g}"
        )
    return said


def _done(folder: Path, config: TrainConfig, saved: TrainConfig | None) -> list[str]:
    more = "more train.steps make it longer, train.resume=never starts it anew and moves what is there aside"
    return [*_changes(config, saved), f"run: {folder} is finished: {config.train.steps} steps are done; {more}"]
