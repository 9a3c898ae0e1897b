"""Checkpoints as `megapar checkpoint` shows and compares them: in one process, a block of a parameter at a time."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megapar.checkpoint.format import (
    MANIFEST,
    RESAVE,
    Manifest,
    find_checkpoint,
    newest_first,
    read_manifest,
    verify_files,
)
from megapar.checkpoint.hf.folder import TORCH_DTYPES
from megapar.checkpoint.load import CheckpointReader
from megapar.config.errors import UserError
from megapar.parallel.boxes import Box


@dataclass(frozen=True)
class Listed:
    """A checkpoint of a list. size: bytes of its files; changed: seconds since the epoch, 0: unknown; problem: one line
    that names the file, None: every file is as it was written. layout: None where the manifest can't be read."""

    folder: Path
    step: int
    size: int
    layout: str | None
    changed: float
    problem: str | None


def checkpoints(path: str | Path) -> list[Path]:
    """The step folders that a path names, by steps: a run's, those of a folder, or one. Raises UserError."""
    found = find_checkpoint(path)
    one = Path(path).resolve() == found.resolve()
    return [found] if one else sorted(newest_first(found.parent), key=lambda folder: int(folder.name[5:]))


def listed(folder: Path) -> Listed:
    """Hashes every file of a step folder."""
    manifest, problem = None, None
    try:
        manifest = read_manifest(folder)
        verify_files(folder, manifest)
    except UserError as error:
        problem = str(error).removesuffix(f"; {RESAVE}")
    entries = list(folder.iterdir()) if folder.is_dir() else []
    size = sum(path.stat().st_size for path in entries if path.is_file() and not path.is_symlink())
    marker = folder / MANIFEST
    changed = marker.lstat().st_mtime if marker.exists() else 0.0
    digits = folder.name.removeprefix("step-")
    step = manifest.step if manifest is not None else int(digits) if digits.isdigit() else -1
    return Listed(folder, step, size, None if manifest is None else manifest.layout, changed, problem)


def described(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """What a checkpoint is, without its values."""
    return {
        "folder": str(folder),
        "step": manifest.step,
        "optimizer_steps": manifest.optimizer_steps,
        "samples": manifest.samples,
        "tokens": manifest.tokens,
        "seed": manifest.seed,
        "layout": manifest.layout,
        "versions": manifest.environment,
        "config_sha256": config_hash(manifest),
        "data": manifest.data,
        "kinds": manifest.kinds,
        "files": {name: file.size for name, file in manifest.files.items()},
        "parameters": {name: list(stored.shape) for name, stored in manifest.parameters.items()},
        "carried": {kind: sorted(table) for kind, table in manifest.carried.items()},
    }


def config_hash(manifest: Manifest) -> str:
    """SHA-256 of the resolved configuration."""
    return hashlib.sha256(json.dumps(manifest.config, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Difference:
    """In what two checkpoints differ. first, second: shown; None: not there. count: elements with other bits; largest:
    absolute difference among them, NaN where one is no number."""

    what: str
    first: Any = None
    second: Any = None
    count: int | None = None
    largest: float | None = None


def differences(first: Path, second: Path) -> Iterator[Difference]:
    """Facts, config keys, data hashes, then every value of every kind of both, whatever layouts wrote them.

    Raises UserError where one of them is damaged.
    """
    folders = first, second
    a, b = (read_manifest(folder) for folder in folders)
    for name in ("step", "optimizer_steps", "samples", "tokens", "seed", "layout"):
        yield from _values(name, getattr(a, name), getattr(b, name))
    yield from _tables("config: ", _flat(a.config), _flat(b.config))
    yield from _tables("data: ", a.data, b.data)
    yield from _tables("", a.kinds, b.kinds, lambda kind: f"kind {kind}")
    readers = [CheckpointReader.verified(*one) for one in zip(folders, (a, b), strict=True)]
    for kind in (kind for kind in a.kinds if kind in b.kinds):
        there, here = ({name: stored.shape for name, stored in one.table(kind).items()} for one in (a, b))
        yield from _tables(f"{kind}: ", there, here)
        for name, shape in there.items():
            if here.get(name) == shape and all(reader.has(kind, name) for reader in readers):
                yield from _bits(kind, name, shape, readers)


def _values(what: str, first: Any, second: Any) -> Iterator[Difference]:
    if first != second:
        yield Difference(what, first, second)


def _tables(
    prefix: str, first: Mapping[str, Any], second: Mapping[str, Any], name: Callable[[str], str] = str
) -> Iterator[Difference]:
    for key in [*first, *(key for key in second if key not in first)]:
        yield from _values(prefix + name(key), first.get(key), second.get(key))


def _flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in node.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def _bits(kind: str, name: str, shape: tuple[int, ...], readers: list[CheckpointReader]) -> Iterator[Difference]:
    count, largest = 0, torch.zeros((), dtype=torch.float64)
    for block in Box((0,) * len(shape), shape).pieces():
        one, other = (_read(reader, kind, name, block) for reader in readers)
        if one.dtype != other.dtype:
            one, other = one.double(), other.double()
        unequal = one.view(_BITS[one.element_size()]) != other.view(_BITS[one.element_size()])
        if unequal.any():
            count += int(unequal.sum())
            largest = torch.maximum(largest, (one.double() - other.double())[unequal].abs().max())  # NaN stays NaN
    if count:
        yield Difference(f"{kind} of {name}", count=count, largest=float(largest))


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _read(reader: CheckpointReader, kind: str, name: str, block: Box) -> Tensor:
    out = torch.empty(block.shape, dtype=TORCH_DTYPES[reader.manifest.kinds[kind]])
    reader.read(kind, name, block, out)
    return out
