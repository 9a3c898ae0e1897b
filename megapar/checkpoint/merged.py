"""The weights of a run with adapters as those of the plain model: base + scale * B A, a box at a time."""

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megapar.checkpoint.format import Manifest, find_checkpoint, read_manifest
from megapar.checkpoint.hf.folder import HfWeights, is_hf_folder, open_weights
from megapar.checkpoint.load import CheckpointReader, refuse_other_base
from megapar.config.errors import UserError
from megapar.config.schema import TrainConfig
from megapar.parallel.boxes import Box
from megapar.parallel.lora import A, B


class Reader(Protocol):
    def read(self, kind: str, name: str, box: Box, out: Tensor) -> None:
        """Fill `out` [box.shape] with a box of a parameter. Raises UserError."""


def open_merged(folder: Path, manifest: Manifest, config: TrainConfig) -> tuple[Reader, str]:
    """Weights of a run's checkpoint, merged if it has adapters, and their dtype. Raises UserError."""
    reader = CheckpointReader.verified(folder, manifest)
    if not config.model.lora.rank:
        return reader, manifest.kinds["weight"]
    refuse_other_base(manifest, config, folder)
    base = config.model.lora.base
    if base is None:
        raise UserError(f"{folder}: adapters beside initial values; there is no model to merge them with")
    if is_hf_folder(base):
        weights = open_weights(Path(base), config)
        return _Merged(_OfHf(weights), reader, config.model.lora.scale), weights.dtype
    there = find_checkpoint(base)
    found = read_manifest(there)
    return _Merged(CheckpointReader.verified(there, found), reader, config.model.lora.scale), found.kinds["weight"]


class _OfHf:
    def __init__(self, weights: HfWeights) -> None:
        self.weights = weights

    def read(self, kind: str, name: str, box: Box, out: Tensor) -> None:
        self.weights.read(name, box, out)


class _Merged:
    def __init__(self, base: Reader, adapters: CheckpointReader, scale: float) -> None:
        self.base, self.adapters, self.scale = base, adapters, scale

    def read(self, kind: str, name: str, box: Box, out: Tensor) -> None:
        stored = self.adapters.manifest.parameters
        if name in stored:  # a classifier
            return self.adapters.read(kind, name, box, out)
        self.base.read(kind, name, box, out)
        a, b = (f"{name.removesuffix('weight')}{one}" for one in (A, B))
        if a in stored:
            rank, wide = stored[a].shape[0], torch.float64
            columns = torch.empty(rank, box.shape[1], dtype=wide)
            rows = torch.empty(box.shape[0], rank, dtype=wide)
            self.adapters.read(kind, a, Box((0, box.offset[1]), (rank, box.shape[1])), columns)
            self.adapters.read(kind, b, Box((box.offset[0], 0), (box.shape[0], rank)), rows)
            out.copy_(out.to(wide).addmm_(rows, columns, alpha=self.scale))
        return None
