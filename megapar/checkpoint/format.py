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
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from megapar.config.errors import UserError
from megapar.parallel.boxes import Box

FORMAT = "megapar-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
LATEST = "latest"
UNFINISHED = ".tmp-"
STEP_FOLDER = re.compile(r"step-[0-9]{8,}")
UNFINISHED_FOLDER = re.compile(STEP_FOLDER.pattern + re.escape(UNFINISHED) + "[0-9a-f]+(-former)?")
SHARD_FILE = re.compile(r"rank-[0-9]{5,}\.safetensors")  # a plain name: nothing can point out of the folder
RESAVE = "use another checkpoint"


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
    kinds: of the state ("weight", "exp_avg", ...), each with its dtype as safetensors names it.
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


def key(kind: str, name: str, box: Box) -> str:
    """The name of a tensor in its file."""
    return f"{kind}/{name}/{'.'.join(map(str, box.offset))}"


def manifest_text(manifest: Manifest) -> str:
    """The text of `manifest.json`."""
    body: dict[str, Any] = {"format": FORMAT, "version": VERSION} | vars(manifest)
    body["parameters"] = {
        name: {"shape": parameter.shape, "boxes": [[b.file, b.box.offset, b.box.shape] for b in parameter.boxes]}
        for name, parameter in manifest.parameters.items()
    }
    body["files"] = {name: vars(file) for name, file in manifest.files.items()}
    rest = json.dumps(body)[1:] + "\n"
    digest = hashlib.sha256(rest.encode()).hexdigest()
    return f'{{"sha256": "{digest}",\n{rest}'


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
        body = json.loads(data)
        if (body["format"], body["version"]) != (FORMAT, VERSION):
            raise UserError(
                f"{path}: format {body['format']} version {body['version']}; this megapar reads {FORMAT} {VERSION}"
            )
        return _parse(body)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a valid manifest ({type(error).__name__}: {error}); {RESAVE}") from None


def _parse(body: dict[str, Any]) -> Manifest:
    files = {str(name): StoredFile(int(f["size"]), str(f["sha256"])) for name, f in body["files"].items()}
    for name in files:
        if not SHARD_FILE.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a file in the folder")
    parameters = {}
    for name, stored in body["parameters"].items():
        shape = tuple(map(int, stored["shape"]))
        boxes = [StoredBox(file, Box(tuple(offset), tuple(size))) for file, offset, size in stored["boxes"]]
        for one in boxes:
            if one.file not in files or not one.box.fits(shape):
                raise ValueError(f"{name} has a part {one.box} in {one.file!r}")
        if sum(one.box.numel for one in boxes) != prod(shape):
            raise ValueError(f"the parts of {name} are not its whole")
        parameters[str(name)] = StoredParameter(shape, boxes)
    fields: dict[str, Any] = {name: int(body[name]) for name in ("step", "optimizer_steps", "samples", "seed")}
    fields |= {name: dict(body[name]) for name in ("config", "environment", "kinds", "data")}
    return Manifest(**fields, layout=str(body["layout"]), parameters=parameters, files=files)


def read_plain_file(path: Path) -> bytes:
    """The bytes of a file that is no link. Raises UserError."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise UserError(f"{path}: missing, so this is no complete checkpoint; {RESAVE}") from None
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); {RESAVE}") from None


def file_facts(path: Path) -> StoredFile:
    """Size and hash of a file that is no link. Raises OSError."""
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return StoredFile(os.fstat(file.fileno()).st_size, digest)


def find_checkpoint(path: str | Path) -> Path:
    """The step folder that a path names: itself, the newest of a folder of checkpoints, or of a run directory.

    The newest is what `latest` says (which may be named, too); where that is missing or names nothing that is there, it
    is the one of most steps. What a folder holds decides, and its own name only if it holds nothing. Raises UserError.
    """
    path = Path(path)
    if path.name == LATEST and path.is_file():
        path = path.parent
    if UNFINISHED_FOLDER.fullmatch(path.name) and not (path / "checkpoints").is_dir():
        raise UserError(f"{path}: an unfinished checkpoint; use a finished one, such as the newest in {path.parent}")
    if (path / MANIFEST).exists():
        return path
    for folder in (path, path / "checkpoints"):
        steps = {entry.name: entry for entry in folder.glob("step-*") if STEP_FOLDER.fullmatch(entry.name)}
        if whole := {name: entry for name, entry in steps.items() if (entry / MANIFEST).exists()}:
            return whole.get(_latest(folder)) or max(whole.values(), key=lambda entry: int(entry.name[5:]))
        if steps:  # and what is missing in them is said when one is read
            return max(steps.values(), key=lambda entry: int(entry.name[5:]))
    if STEP_FOLDER.fullmatch(path.name):
        return path
    remedy = "give a step folder, a folder of checkpoints, or a run.dir that has one"
    raise UserError(f"{path}: {'holds no checkpoint' if path.is_dir() else 'no such folder'}; {remedy}")


def _latest(folder: Path) -> str:
    try:
        return (folder / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
