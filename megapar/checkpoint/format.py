"""The checkpoint format: a folder of safetensors files and a manifest that says what is where.

    checkpoints/
        latest                        name of the newest folder
        step-00000100/
            manifest.json             see `Manifest`
            rank-00000.safetensors    one per writing rank; key KIND/NAME/OFFSETS, such as weight/head.weight/30.0
        step-00000200.tmp-1f2e3d4c/   being written, or left behind by a crash: never read

Every tensor is a box of a logical parameter, so nothing in it depends on the layout that wrote it. The first line of
the manifest is the SHA-256 of all that follows it, and the manifest holds that of every file. Nothing is pickled.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any

from megapar.config.errors import UserError
from megapar.parallel.boxes import Box

FORMAT = "megapar-checkpoint"
VERSION = 1
MOST = 1 << 62  # of what is counted
SECTIONS = ("model", "train", "optim", "parallel", "pipeline", "data", "task")  # of a config that are read from one
MANIFEST = "manifest.json"
LATEST = "latest"
UNFINISHED = ".tmp-"
STEP_FOLDER = re.compile(r"step-[0-9]{8,}")
UNFINISHED_FOLDER = re.compile(STEP_FOLDER.pattern + re.escape(UNFINISHED) + "[0-9a-f]+(-former)?")
SHARD_FILE = re.compile(r"rank-[0-9]{5,}\.safetensors")  # a plain name: nothing can point out of the folder
NAME = re.compile(r"[^\x00-\x1f\x7f]+")  # of a parameter or a kind: no control characters
ITEM = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}  # bytes, by what safetensors calls a dtype
RESAVE = "use another checkpoint"
HASHING = 4  # files that a process hashes at a time


@dataclass(frozen=True)
class StoredBox:
    """A box of a logical parameter in a file."""

    file: str
    box: Box


@dataclass(frozen=True)
class StoredParameter:
    """A logical parameter: its shape, and boxes that together are the whole, each element once."""

    shape: tuple[int, ...]
    boxes: list[StoredBox]


@dataclass(frozen=True)
class StoredFile:
    """size in bytes, sha256 in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

    step: training steps done. optimizer_steps: updates made by them (skipped steps make none). samples: training
    samples consumed, the data cursor. seed: of the data order and dropout. layout: that wrote it, for people only.
    config: the resolved config. environment: versions. data: hashes of the token file and the tokenizer, where known.
    kinds: of the state ("weight", "exp_avg", ...), each with its dtype as safetensors names it. tokens: seen in
    training, padding counted; None where that was not written down. carried: by kind and name what compressed gradient
    reduction leaves to the next step, see `megapar.parallel.carried`.
    """

    step: int
    optimizer_steps: int
    samples: int
    seed: int
    layout: str
    config: dict[str, Any]
    environment: dict[str, str]
    kinds: dict[str, str]
    parameters: dict[str, StoredParameter]
    files: dict[str, StoredFile]
    data: dict[str, str] = field(default_factory=dict)
    tokens: int | None = None
    carried: dict[str, dict[str, StoredParameter]] = field(default_factory=dict)

    def table(self, kind: str) -> dict[str, StoredParameter]:
        """Where the values of a kind are, by name."""
        return self.carried.get(kind, self.parameters)


def shard(rank: int) -> str:
    """The name of the file that a rank writes."""
    return f"rank-{rank:05d}.safetensors"


def key(kind: str, name: str, box: Box) -> str:
    """The name of a tensor in its file."""
    return f"{kind}/{name}/{'.'.join(map(str, box.offset))}"


def manifest_text(manifest: Manifest) -> str:
    """The text of `manifest.json`."""
    body: dict[str, Any] = {"format": FORMAT, "version": VERSION} | vars(manifest)
    body["parameters"] = _table_body(manifest.parameters)
    body["carried"] = {kind: _table_body(table) for kind, table in manifest.carried.items()}
    for name in ("tokens", "carried"):  # a checkpoint without them is as it was before there were any
        if not body[name]:
            del body[name]
    body["files"] = {name: vars(file) for name, file in manifest.files.items()}
    rest = json.dumps(body)[1:] + "\n"
    digest = hashlib.sha256(rest.encode()).hexdigest()
    return f'{{"sha256": "{digest}",\n{rest}'


def _table_body(table: dict[str, StoredParameter]) -> dict[str, Any]:
    return {
        name: {"shape": stored.shape, "boxes": [[b.file, b.box.offset, b.box.shape] for b in stored.boxes]}
        for name, stored in table.items()
    }


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a step folder. Raises UserError, one line, where it is missing, changed or not one of ours."""
    path = folder / MANIFEST
    data = read_plain_file(path)
    first, _, rest = data.partition(b"\n")
    match = re.fullmatch(rb'\{"sha256": "([0-9a-f]{64})",', first)
    if match is None:
        raise UserError(f"{path}: not a megapar checkpoint's manifest (at byte 0); {RESAVE}")
    if hashlib.sha256(rest).hexdigest().encode() != match[1]:
        raise UserError(f"{path}: truncated or changed (its SHA-256 is not the one in its first line); {RESAVE}")
    try:
        body = json.loads(data, object_pairs_hook=_without_duplicates)
        if (body["format"], body["version"]) != (FORMAT, VERSION):
            raise UserError(
                f"{path}: format {body['format']} version {body['version']}; this megapar reads {FORMAT} {VERSION}"
            )
        manifest = _parse(body)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        problem = f"{type(error).__name__}: {error}" if str(error).isprintable() else type(error).__name__
        raise UserError(f"{path}: not a valid manifest ({problem}); {RESAVE}") from None
    if STEP_FOLDER.fullmatch(folder.name) and int(folder.name[5:]) != manifest.step:
        raise UserError(f"{path}: is of step {manifest.step}, so it was moved, or its folder renamed; {RESAVE}")
    return manifest


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} is there twice")
        found[name] = value
    return found


def _parse(body: dict[str, Any]) -> Manifest:
    files = {str(name): StoredFile(int(f["size"]), str(f["sha256"])) for name, f in body["files"].items()}
    for name in files:
        if not SHARD_FILE.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a file in the folder")
    kinds = {_name(kind): str(dtype) for kind, dtype in dict(body["kinds"]).items()}
    if unknown := set(kinds.values()) - ITEM.keys():
        raise ValueError(f"no known dtype: {min(unknown)!r}")
    parameters = _parse_parameters(body["parameters"], files)
    carried = {_name(kind): _parse_parameters(table, files) for kind, table in body.get("carried", {}).items()}
    if "weight" in carried:
        raise ValueError("weights are parameters")
    least = dict.fromkeys(files, 0)
    for kind, table in ({"weight": parameters} | carried).items():
        for one in (one for stored in table.values() for one in stored.boxes):
            least[one.file] += one.box.numel * ITEM[kinds[kind]]
    for name, size in least.items():
        if size > files[name].size:
            raise ValueError(f"{name!r} of {files[name].size} bytes can't hold {size}")
    fields: dict[str, Any] = {name: _count(body, name) for name in ("step", "optimizer_steps", "samples", "seed")}
    fields |= {
        name: {_text(key): _text(value) for key, value in body[name].items()} for name in ("environment", "data")
    }
    config = {_text(name): value for name, value in body["config"].items()}
    if wrong := [name for name in SECTIONS if not isinstance(config.get(name, {}), dict)]:
        raise TypeError(f"config.{wrong[0]} is no group of keys")
    return Manifest(
        **fields,
        config=config,
        kinds=kinds,
        layout=_text(body["layout"]),
        parameters=parameters,
        files=files,
        tokens=None if body.get("tokens") is None else _count(body, "tokens"),
        carried=carried,
    )


def _count(body: dict[str, Any], name: str) -> int:
    value = body[name]
    if type(value) is not int or not 0 <= value < MOST:
        raise ValueError(f"{name} is no number of something")
    return value


def _text(value: Any) -> str:
    """As a terminal may show it."""
    if not isinstance(value, str) or not value.isprintable():
        raise TypeError("what is to be a word is none")
    return value


def _name(text: str) -> str:
    if not NAME.fullmatch(text):
        raise ValueError(f"{text!r} is no name")
    return text


def _parse_parameters(body: dict[str, Any], files: dict[str, StoredFile]) -> dict[str, StoredParameter]:
    parameters = {}
    for name, stored in body.items():
        shape = _ints(stored["shape"])
        if 0 in shape:
            raise ValueError(f"{name} has no values")
        boxes = [StoredBox(file, Box(_ints(offset), _ints(size))) for file, offset, size in stored["boxes"]]
        for one in boxes:
            if one.file not in files or not one.box.fits(shape):
                raise ValueError(f"{name} has a part {one.box} in {one.file!r}")
        if sum(one.box.numel for one in boxes) != prod(shape) or _overlap([one.box for one in boxes]):
            raise ValueError(f"the parts of {name} are not its whole")
        parameters[_name(name)] = StoredParameter(shape, boxes)
    return parameters


def _ints(values: list[Any]) -> tuple[int, ...]:
    if any(type(value) is not int for value in values):
        raise TypeError(f"{values} are no whole numbers")
    return tuple(values)


def _overlap(boxes: Sequence[Box]) -> bool:
    """Whether two boxes have an element in common."""
    if len(boxes) < 2 or not boxes[0].offset:
        return len(boxes) > 1
    # Along the dim that tells most of them apart.
    dim = max(range(len(boxes[0].offset)), key=lambda dim: len({box.offset[dim] for box in boxes}))
    near: list[Box] = []  # those that reach, along it, as far as the next one's beginning
    for box in sorted(boxes, key=lambda box: box.offset[dim]):
        near = [other for other in near if other.offset[dim] + other.shape[dim] > box.offset[dim]]
        if any(box.overlap(other) is not None for other in near):
            return True
        near.append(box)
    return False


def read_plain_file(path: Path) -> bytes:
    """The bytes of a file that is no link. Raises UserError."""
    try:
        with _open_plain(path) as file:
            return file.read()
    except FileNotFoundError:
        raise UserError(f"{path}: missing, so this is no complete checkpoint; {RESAVE}") from None
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); {RESAVE}") from None


@contextmanager
def _open_plain(path: Path) -> Iterator[BufferedReader]:
    """A file to read that is a file: no link, and nothing that a reader may wait for. Raises OSError."""
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(0, "not a regular file")
        yield file


def verify_files(folder: Path, manifest: Manifest, names: Sequence[str] | None = None) -> None:
    """Hash these files of a step folder (default: all), a few at a time, and compare with the manifest.

    Raises UserError, one line that names the first file, in their order, that is missing or not as it was written.
    """
    names = list(manifest.files) if names is None else names
    if not names:
        return
    with ThreadPoolExecutor(min(HASHING, len(names))) as threads:
        problems = threads.map(lambda name: _problem(folder / name, manifest.files[name]), names)
        for name, problem in zip(names, problems, strict=True):
            if problem is not None:
                raise UserError(f"{folder / name}: {problem}; {RESAVE}")


def _problem(path: Path, expected: StoredFile) -> str | None:
    """What is wrong with a file; None: nothing."""
    try:
        with _open_plain(path) as file:
            if (size := os.fstat(file.fileno()).st_size) != expected.size:
                return f"truncated or changed, {size} bytes where {expected.size} were written"
            if hash_of(file) != expected.sha256:
                return "changed, its SHA-256 is not the one in the manifest"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"can't be read ({error.strerror})"
    return None


def hash_of(file: BufferedReader) -> str:
    """SHA-256 in hexadecimal of what is left of a file."""
    return hashlib.file_digest(file, "sha256").hexdigest()


def find_checkpoint(path: str | Path) -> Path:
    """The step folder that a path names: itself, the newest of a folder of checkpoints, or of a run directory.

    The newest is the one of most steps. A path may also end in `latest`, which then says which one it is, if that is
    there. What a folder holds decides, and its own name only if it holds nothing. Raises UserError.
    """
    path = Path(path)
    if path.name == LATEST and path.is_file():
        named = next((entry for entry in newest_first(path.parent) if entry.name == latest_name(path.parent)), None)
        path = named or path.parent
    if UNFINISHED_FOLDER.fullmatch(path.name) and not (path / "checkpoints").is_dir():
        raise UserError(f"{path}: an unfinished checkpoint; use a finished one, such as the newest in {path.parent}")
    if (path / MANIFEST).exists():
        return path
    for folder in (path, path / "checkpoints"):
        newest = newest_first(folder)
        for entry in newest:
            if (entry / MANIFEST).exists():
                return entry
        if newest:  # and what is missing in them is said when one is read
            return newest[0]
    if STEP_FOLDER.fullmatch(path.name):
        return path
    remedy = "give a step folder, a folder of checkpoints, or a run.dir that has one"
    raise UserError(f"{path}: {'holds no checkpoint' if path.is_dir() else 'no such folder'}; {remedy}")


def newest_first(folder: Path) -> list[Path]:
    """The step folders in a folder of checkpoints, most steps first."""
    steps = [entry for entry in folder.glob("step-*") if STEP_FOLDER.fullmatch(entry.name)]
    return sorted(steps, key=lambda entry: int(entry.name[5:]), reverse=True)


def latest_name(folder: Path) -> str:
    """What `latest` says, in a folder of checkpoints; empty where it says nothing."""
    try:
        with _open_plain(folder / LATEST) as file:
            return file.read(1 << 10).decode().strip()
    except (OSError, UnicodeDecodeError):
        return ""
