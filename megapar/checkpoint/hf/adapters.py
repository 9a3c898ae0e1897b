"""Adapters of a run as PEFT has them on disk: adapter_config.json and adapter_model.safetensors."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megapar.checkpoint.hf.family import Family
from megapar.checkpoint.hf.folder import TORCH_DTYPES, OnDisk, is_hf_folder, logical_shapes, places
from megapar.checkpoint.hf.write import Entry, new_folder, write_tensors
from megapar.checkpoint.load import CheckpointReader
from megapar.config.errors import ConfigError, UserError
from megapar.config.schema import TrainConfig
from megapar.parallel.boxes import Box
from megapar.parallel.lora import A, B

MODEL = "base_model.model."  # in front of the names of the model's own tensors


def export_adapters(
    target: Path,
    reader: CheckpointReader,
    config: TrainConfig,
    family: Family,
    prefix: str,
    dtype: str,
    say: Callable[[str], None],
) -> None:
    """Write the adapters of a checkpoint, in a dtype as safetensors names it.

    Raises ConfigError or UserError for a run without, and where several matrices are one tensor on disk, which has one
    adapter in PEFT.
    """
    lora, manifest, folder = config.model.lora, reader.manifest, reader.folder
    if not lora.rank:
        raise ConfigError("adapters", True, f"{folder} has none (model.lora.rank=0); leave it out")
    there, _ = places(family, logical_shapes(config), prefix)
    names = {name.removesuffix(A) for name in manifest.parameters if name.endswith(A)}
    found = {name: there[f"{name}weight"] for name in sorted(names)}
    for name, place in found.items():
        if sum(place.disk == other.disk for other in there.values()) > 1:
            problem = f"{place.disk} is one tensor with one adapter there, and {name}lora_A is of a part of it"
            raise UserError(f"{family.model_type}: {problem}; leave adapters=true out, which merges them")
    entries, ours = [], {}
    for name, place in found.items():
        for which in (A, B):
            disk = MODEL + place.disk.removesuffix("weight") + which
            shape = manifest.parameters[name + which].shape
            entries.append(Entry(disk, shape, dtype))
            ours[disk] = name + which

    def values() -> Iterator[Tensor]:
        for entry in entries:
            out = torch.empty(entry.shape, dtype=TORCH_DTYPES[dtype])
            reader.read("weight", ours[entry.name], Box((0,) * len(entry.shape), entry.shape), out)
            yield out

    with new_folder(target) as temporary:
        write_tensors(temporary / "adapter_model.safetensors", entries, values(), {"format": "pt"})
        facts = json.dumps(_config(config, list(found.values())), indent=2)
        (temporary / "adapter_config.json").write_text(f"{facts}\n", encoding="utf-8")
    say(f"{len(found)} adapters of rank {lora.rank} to {target}")
    if _base_on_disk(lora.base) is None:
        say(f"they stand beside {lora.base}, a run: for PEFT, megapar export that, too, and load them on it")


def _base_on_disk(base: str | None) -> str | None:
    """The base as PEFT looks for it: a folder that transformers loads."""
    return base if base is not None and is_hf_folder(base) else None


def _config(config: TrainConfig, found: list[OnDisk]) -> dict[str, Any]:
    lora = config.model.lora
    modules = {".".join(place.disk.split(".")[-3:-1]) for place in found}  # self_attn.q_proj
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if config.model.causal else None,
        "base_model_name_or_path": _base_on_disk(lora.base),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(place.transposed for place in found),
        "target_modules": sorted(modules),
        "inference_mode": True,
    }
