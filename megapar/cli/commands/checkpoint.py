"""`megapar checkpoint ls|verify|show|diff|convert`: what checkpoints hold, if they are whole, and copies for others."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megapar.cli.command import Call, Command
from megapar.config.errors import ConfigError
from megapar.config.keys import check_values, option

STEP = "a step folder, a folder of checkpoints or a run directory, of which the newest is taken"
OUT = "file for the same as JSON; default: the terminal alone"


@dataclass(frozen=True)
class ListConfig:
    """`megapar checkpoint ls` and `verify`: the checkpoints of a run, each file hashed."""

    path: str | None = option(
        None, "a run directory, a folder of checkpoints, or one step folder", verbatim=True, path=True
    )


@dataclass(frozen=True)
class ShowConfig:
    """`megapar checkpoint show`: what a checkpoint holds."""

    path: str | None = option(None, STEP, verbatim=True, path=True)
    out: str | None = option(None, OUT, verbatim=True, path=True, identity=False)


@dataclass(frozen=True)
class DiffConfig:
    """`megapar checkpoint diff`: in what two checkpoints differ, whatever layouts wrote them."""

    first: str | None = option(None, STEP, verbatim=True, path=True)
    second: str | None = option(None, "what it is compared with", verbatim=True, path=True)
    out: str | None = option(None, OUT, verbatim=True, path=True, identity=False)


@dataclass(frozen=True)
class ConvertConfig:
    """`megapar checkpoint convert`: whole tensors in a format that others read."""

    path: str | None = option(None, STEP, verbatim=True, path=True)
    out: str | None = option(None, "folder to make", verbatim=True, path=True, identity=False)
    to: Literal["safetensors", "dcp"] = option("safetensors", "safetensors, or dcp: torch.distributed.checkpoint's")
    state: bool = option(False, "the optimizer's state, too, as NAME.KIND")
    shard_gb: float = option(5.0, "most that a safetensors file holds, in GB", above=0)


def ls(config: ListConfig, call: Call) -> int:
    """Print a line for each checkpoint. Returns the exit code."""
    from datetime import datetime

    from megapar.checkpoint.look import checkpoints, listed

    rows = [("step", "size", "layout", "age", "files")]
    for folder in checkpoints(_given("path", config.path)):
        one = listed(folder)
        age = f"{datetime.now() - datetime.fromtimestamp(one.changed)}".partition(".")[0] if one.changed else "?"
        rows.append((str(one.step), _size(one.size), one.layout or "?", age, one.problem or "verified"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        print("  ".join(f"{text:>{width}}" for text, width in zip(row, widths, strict=False)) + f"  {row[4]}")
    return 0


def verify(config: ListConfig, call: Call) -> int:
    """Hash every file. Returns the exit code: 1 where a checkpoint is not as it was written."""
    from megapar.checkpoint.look import checkpoints, listed

    damaged = False
    for folder in checkpoints(_given("path", config.path)):
        one = listed(folder)
        damaged |= one.problem is not None
        print(one.problem or f"{folder}: verified, {_size(one.size)}")
    return int(damaged)


def show(config: ShowConfig, call: Call) -> int:
    """Print what a checkpoint holds. Returns the exit code."""
    from megapar.checkpoint.format import find_checkpoint, read_manifest
    from megapar.checkpoint.look import described

    _refuse(config.out)
    folder = find_checkpoint(_given("path", config.path))
    facts = described(folder, read_manifest(folder))
    for name in ("folder", "step", "optimizer_steps", "samples", "tokens", "seed", "layout", "config_sha256"):
        print(f"{name:<16} {facts[name]}")
    for name in ("versions", "data", "kinds"):
        print(f"{name:<16} {', '.join(f'{key} {value}' for key, value in facts[name].items())}")
    print(f"{'carried':<16} {', '.join(facts['carried']) or 'nothing'}")
    print(f"{'files':<16} {len(facts['files'])}, {_size(sum(facts['files'].values()))}")
    for name, shape in facts["parameters"].items():
        print(f"  {name} {shape}")
    _write(config.out, facts)
    return 0


def diff(config: DiffConfig, call: Call) -> int:
    """Print what differs. Returns the exit code: 1 where something does."""
    from megapar.checkpoint.format import find_checkpoint
    from megapar.checkpoint.look import differences

    _refuse(config.out)
    folders = [find_checkpoint(_given(key, getattr(config, key))) for key in ("first", "second")]
    found = list(differences(*folders))
    for one in found:
        values = f"{one.count:,} values, by {one.largest:.3g} at most" if one.count else f"{one.first} | {one.second}"
        print(f"{one.what}: {values}")
    if not found:
        print("the same, to the bit")
    _write(config.out, [vars(one) for one in found])
    return int(bool(found))


def convert(config: ConvertConfig, call: Call) -> int:
    """Write the folder. Returns the exit code."""
    from megapar.checkpoint.export import Whole, to_dcp, to_safetensors
    from megapar.checkpoint.format import find_checkpoint
    from megapar.cli.output import say

    check_values(config)
    folder, target = find_checkpoint(_given("path", config.path)), Path(_given("out", config.out))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError("out", config.out, "is there already; name a folder that is not, or is empty")
    whole = Whole(folder, state=config.state)
    dcp = config.to == "dcp"
    files = to_dcp(whole, target) if dcp else to_safetensors(whole, target, int(config.shard_gb * 1e9))
    say(f"{len(whole.entries)} tensors of {folder}, in {files} files, to {target}")
    return 0


def _given(key: str, value: str | None) -> str:
    if value is None:
        raise ConfigError(key, None, f"says which; give {key}=FOLDER")
    return value


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def _refuse(out: str | None) -> None:
    """Before anything is shown."""
    from megapar.cli.output import refuse_bad_out

    refuse_bad_out(out, None)


def _write(out: str | None, value: Any) -> None:
    import json

    from megapar.files import write_atomic
    from megapar.train.metrics import finite

    if out is not None:
        write_atomic(Path(out), json.dumps(finite(value), indent=1, allow_nan=False) + "\n")


COMMANDS = [
    Command(
        name="checkpoint ls",
        config=ListConfig,
        run=ls,
        order=5,
        about="list a run's checkpoints, and hash their files",
        examples=[("megapar checkpoint ls runs/demo", "step, size, layout, age; verified, or what is wrong")],
        most_used=["path"],
        positional="path",
    ),
    Command(
        name="checkpoint verify",
        config=ListConfig,
        run=verify,
        order=5,
        about="hash every file of a checkpoint, or of all of a run; exit code 1 for damage",
        examples=[
            ("megapar checkpoint verify runs/demo", "all of a run"),
            ("megapar checkpoint verify runs/demo/checkpoints/step-00000100", "one"),
        ],
        most_used=["path"],
        positional="path",
    ),
    Command(
        name="checkpoint show",
        config=ShowConfig,
        run=show,
        order=5,
        about="print what a checkpoint holds: steps, samples, versions, parameters",
        examples=[("megapar checkpoint show runs/demo out=facts.json", "of the newest, and as JSON")],
        most_used=["path", "out"],
        positional="path",
    ),
    Command(
        name="checkpoint diff",
        config=DiffConfig,
        run=diff,
        order=5,
        about="compare two checkpoints bit by bit, whatever layouts wrote them; exit code 1 for a difference",
        examples=[("megapar checkpoint diff runs/a runs/b", "config keys, data, and every value of the newest ones")],
        most_used=["first", "second", "out"],
        positional=("first", "second"),
    ),
    Command(
        name="checkpoint convert",
        config=ConvertConfig,
        run=convert,
        order=5,
        about="write a checkpoint's whole tensors as safetensors, or for torch.distributed.checkpoint",
        examples=[
            ("megapar checkpoint convert runs/demo out=weights", "weights, in model.safetensors"),
            ("megapar checkpoint convert runs/demo out=dcp to=dcp state=true", "all of it, for torch"),
        ],
        most_used=["path", "out", "to", "state", "shard_gb"],
        positional="path",
    ),
]
