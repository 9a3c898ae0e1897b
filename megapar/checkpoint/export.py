"""A checkpoint in formats of others, whole tensors by name; nothing here reads them back. Memory: one parameter."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megapar.checkpoint.format import read_manifest
from megapar.checkpoint.hf.folder import INDEX, SINGLE, TORCH_DTYPES
from megapar.checkpoint.hf.write import Entry, index_of, new_folder, shards, write_tensors
from megapar.checkpoint.load import CheckpointReader
from megapar.config.errors import UserError
from megapar.parallel.boxes import Box


class Whole:
    """The parameters of a checkpoint as whole tensors; its files are hashed first. Raises UserError.

    state: the optimizer's, too. entries: by name: NAME for weights, NAME.KIND for the state beside them.
    """

    def __init__(self, folder: Path, *, state: bool = False) -> None:
        manifest = read_manifest(folder)
        self.reader = CheckpointReader.verified(folder, manifest)
        kinds = [kind for kind in manifest.kinds if kind not in manifest.carried] if state else ["weight"]
        self._of = {
            name if kind == "weight" else f"{name}.{kind}": (kind, name)
            for kind in kinds
            for name in manifest.parameters
            if self.reader.has(kind, name)
        }
        self.entries = {
            entry: Entry(entry, manifest.parameters[name].shape, manifest.kinds[kind])
            for entry, (kind, name) in self._of.items()
        }

    def read(self, name: str) -> Tensor:
        """A whole tensor, by the name of its entry."""
        entry, (kind, parameter) = self.entries[name], self._of[name]
        out = torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype])
        self.reader.read(kind, parameter, Box((0,) * len(entry.shape), entry.shape), out)
        return out


def to_safetensors(whole: Whole, target: Path, most: int) -> int:
    """Write a folder of safetensors files of at most `most` bytes, or of one tensor. Returns their number. Raises
    UserError."""
    parts = shards(whole.entries.values(), most)
    names = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    names = names if len(parts) > 1 else [SINGLE]

    def values(part: list[Entry]) -> Iterator[Tensor]:
        for entry in part:
            yield whole.read(entry.name)

    with new_folder(target) as temporary:
        for name, part in zip(names, parts, strict=True):
            write_tensors(temporary / name, part, values(part), {"format": "pt"})
        if len(parts) > 1:
            (temporary / INDEX).write_text(json.dumps(index_of(names, parts), indent=2) + "\n", encoding="utf-8")
    return len(parts)


def to_dcp(whole: Whole, target: Path) -> int:
    """Have torch.distributed.checkpoint write a folder, a file for each tensor. Returns how many. Raises UserError."""
    from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, save

    class Planner(DefaultSavePlanner):
        """Plans with tensors that have no memory, and reads each when it is written."""

        def lookup_object(self, index: Any) -> Any:
            return whole.read(index.fqn)

    plan = {
        name: torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype], device="meta")
        for name, entry in whole.entries.items()
    }
    with new_folder(target) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is a single process, which is said by no_dist already
        writer = FileSystemWriter(temporary, single_file_per_rank=False)
        try:
            save(plan, storage_writer=writer, planner=Planner(), no_dist=True)
        except OSError as error:
            raise UserError(
                f"{target}: can't be written ({error.strerror}); make room, or name another folder"
            ) from None
    return len(plan)
