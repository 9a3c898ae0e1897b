"""Safetensors files written a tensor at a time, so that none needs the memory of the whole."""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megapar.checkpoint.format import ITEM, StoredFile
from megapar.config.errors import UserError


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target`, which is empty or not there: made whole or not at all. Raises UserError
    where it can't be written."""
    temporary = target.with_name(f"{target.name}.tmp-{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if target.exists():
            target.rmdir()
        temporary.rename(target)
    except OSError as error:
        raise UserError(f"{target}: can't be written ({error.strerror}); make room, or name another folder") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@dataclass(frozen=True)
class Entry:
    """A tensor that is to be written. dtype: as safetensors names it."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM[self.dtype]


def shards(entries: Iterable[Entry], most: int) -> list[list[Entry]]:
    """The entries in order, in files of at most `most` bytes, or of one entry."""
    found: list[list[Entry]] = []
    size = 0
    for entry in entries:
        if not found or size + entry.nbytes > most:
            found.append([])
            size = 0
        found[-1].append(entry)
        size += entry.nbytes
    return found


def index_of(names: Sequence[str], parts: Sequence[Sequence[Entry]]) -> dict[str, Any]:
    """What `model.safetensors.index.json` says: which file has a tensor."""
    entries = [entry for part in parts for entry in part]
    return {
        "metadata": {
            "total_size": sum(entry.nbytes for entry in entries),
            "total_parameters": sum(prod(entry.shape) for entry in entries),
        },
        "weight_map": {entry.name: name for name, part in zip(names, parts, strict=True) for entry in part},
    }


def write_tensors(
    path: Path, entries: list[Entry], values: Iterator[Tensor], metadata: Mapping[str, str]
) -> StoredFile:
    """`stream_tensors`. Raises UserError."""
    try:
        return stream_tensors(path, entries, values, metadata)
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror}); make room, or name another folder") from None


def stream_tensors(
    path: Path, entries: Sequence[Entry], values: Iterable[Tensor], metadata: Mapping[str, str]
) -> StoredFile:
    """Write a file and make it durable: values yields every entry's tensor in its dtype, on the CPU, in the same order.

    The format: 8 bytes with the length of a JSON header, the header, then the tensors' bytes. Returns its facts, the
    hash being that of the bytes in memory. Raises OSError.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    position = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": entry.shape,
            "data_offsets": [position, position + entry.nbytes],
        }
        position += entry.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(head)
    with open(path, "wb") as file:
        file.write(head)
        for entry, value in zip(entries, values, strict=True):
            assert tuple(value.shape) == entry.shape and value.element_size() == ITEM[entry.dtype], entry
            data = value.contiguous().view(-1).view(torch.uint8).numpy().data
            for start in range(0, len(data), _PIECE):
                digest.update(data[start : start + _PIECE])
                file.write(data[start : start + _PIECE])
            del data, value  # before the next one is made
        file.flush()
        os.fsync(file.fileno())
    return StoredFile(len(head) + position, digest.hexdigest())


_PIECE = 1 << 22  # bytes that are hashed and then written: few enough to be in a cache both times
