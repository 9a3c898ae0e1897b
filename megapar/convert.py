"""`megapar import` and `megapar export`: a Hugging Face folder to a run's directory and back, one tensor at a time."""

import contextlib
import json
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megapar.checkpoint.format import (
    Manifest,
    StoredBox,
    StoredParameter,
    find_checkpoint,
    key,
    read_manifest,
    shard,
)
from megapar.checkpoint.hf.adapters import export_adapters
from megapar.checkpoint.hf.family import Family, families, in_full, to_model
from megapar.checkpoint.hf.folder import (
    CONFIG,
    INDEX,
    SINGLE,
    TORCH_DTYPES,
    HfWeights,
    is_hf_folder,
    logical_shapes,
    model_keys,
    places,
    read_config,
    trained_shapes,
)
from megapar.checkpoint.hf.write import Entry, index_of, new_folder, shards, write_tensors
from megapar.checkpoint.load import CheckpointReader
from megapar.checkpoint.merged import open_merged
from megapar.checkpoint.save import begin, environment, finish
from megapar.config.derive import resolve
from megapar.config.errors import ConfigError, UserError
from megapar.config.file import dump, load_trained
from megapar.config.keys import changed
from megapar.config.parse import to_dict
from megapar.config.run_schema import ExportConfig
from megapar.config.schema import TrainConfig
from megapar.data.tokenizer.files import copy_into, tokenizer_in
from megapar.files import write_atomic
from megapar.parallel.boxes import Box

KEPT = "hf"  # in a run's directory: the small files of the folder that it was imported from
NAMES = "names.json"  # there: what the folder's names of tensors began with
_SMALL = ("*.json", "*.model", "*.txt", "*.jinja")
_DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
_TORCH_NAMES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
SHARD = 5_000_000_000
ROOM = "make room, or name another folder"

Say = Callable[[str], None]


def import_folder(source: Path, run_dir: Path, say: Say) -> TrainConfig:
    """Make a run's directory from a Hugging Face folder: config.yaml, a checkpoint of the weights, the small files.

    The checkpoint holds whole parameters in the folder's dtype, which any layout loads. Peak memory: the largest
    parameter. Returns the config. Raises UserError before anything is written where the folder can't be read.
    """
    keys, length = model_keys(source)
    config = changed(TrainConfig(), {"model": to_model(keys), "train.seq_length": length, "run.dir": str(run_dir)})
    config = resolve(config)
    shapes = logical_shapes(config)
    weights = HfWeights(source, shapes)
    _refuse_full("run.dir", run_dir)
    there = run_dir.exists()
    folder = run_dir / "checkpoints"
    final = folder / "step-00000000"
    temporary = folder / f"{final.name}.tmp-{secrets.token_hex(4)}"
    dtypes = {header.dtype for header in weights.headers.values()}
    dtype = weights.dtype if len(dtypes) == 1 and weights.dtype in TORCH_DTYPES else "F32"
    try:
        begin(folder, temporary)
        _copy_small(source, run_dir / KEPT)
        _write_json(run_dir / KEPT / NAMES, {"prefix": weights.prefix})
        manifest = _write_checkpoint(temporary, weights, shapes, dtype, config)
        write_atomic(run_dir / "config.yaml", dump(config))
        finish(temporary, final, manifest)
    except BaseException as error:
        for left_over in (folder, run_dir / KEPT):
            shutil.rmtree(left_over, ignore_errors=True)
        with contextlib.suppress(OSError):
            (run_dir / "config.yaml").unlink(missing_ok=True)
            if not there:
                run_dir.rmdir()
        if isinstance(error, OSError):
            raise UserError(f"{run_dir}: can't be written ({error.strerror}); {ROOM}") from None
        raise
    say(f"{sum(map(_numel, shapes.values())):,} parameters in {len(shapes)} tensors, {dtype}, to {final}")
    return config


def _refuse_full(key: str, folder: Path) -> None:
    """Raise ConfigError for a folder to write that holds something, or is none."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            key, folder, "holds something already; name another folder" if folder.is_dir() else "is a file"
        )


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _write_checkpoint(
    folder: Path, weights: HfWeights, shapes: dict[str, tuple[int, ...]], dtype: str, config: TrainConfig
) -> Manifest:
    parameters, files = {}, {}
    boxes = {name: Box((0,) * len(shape), shape) for name, shape in shapes.items()}
    names = {key("weight", name, box): name for name, box in boxes.items()}
    entries = [Entry(stored, shapes[name], dtype) for stored, name in names.items()]

    def values(part: list[Entry]) -> Iterator[Tensor]:
        for entry in part:
            out = torch.empty(entry.shape, dtype=TORCH_DTYPES[dtype])
            weights.read(names[entry.name], boxes[names[entry.name]], out)
            yield out
            del out

    for number, part in enumerate(shards(entries, SHARD)):
        path = folder / shard(number)
        files[path.name] = write_tensors(path, part, values(part), {})
        for entry in part:
            name = names[entry.name]
            parameters[name] = StoredParameter(shapes[name], [StoredBox(path.name, boxes[name])])
    return Manifest(
        step=0,
        optimizer_steps=0,
        samples=0,
        seed=config.train.seed,
        layout="single",
        config=to_dict(config),
        environment=environment(),
        kinds={"weight": dtype},
        parameters=parameters,
        files=files,
    )


def _copy_small(source: Path, target: Path) -> None:
    """Copy the tokenizer and what else is small, and not the index of weights."""
    target.mkdir(parents=True, exist_ok=True)
    for pattern in _SMALL:
        for path in sorted(source.glob(pattern)):
            if path.is_file() and path.name != INDEX and not path.name.endswith(".index.json"):
                shutil.copyfile(path, target / path.name)


def origin_of(path: str | Path) -> Path:
    """The folder that a checkpoint's path belongs to: a Hugging Face folder, or a run's directory."""
    path = Path(path).expanduser().absolute()
    return next((one for one in (path, *path.parents[:2]) if (one / "config.yaml").exists()), path)


def keep_origin(path: str | Path, run_dir: Path) -> None:
    """Copy into a run's directory what its weights' origin has besides weights, for when the run is exported."""
    origin = origin_of(path)
    if is_hf_folder(origin):
        _copy_small(origin, run_dir / KEPT)
    elif (origin / KEPT).is_dir() and origin != run_dir.absolute():
        shutil.copytree(origin / KEPT, run_dir / KEPT, dirs_exist_ok=True)


def tokenizer_of(path: str | Path) -> Path | None:
    """The tokenizer that weights were trained with, if it is there."""
    origin = origin_of(path)
    return tokenizer_in(origin) or tokenizer_in(origin / KEPT)


def export_run(config: ExportConfig, say: Say) -> None:
    """Write a run's weights as a Hugging Face folder. Peak memory: the largest tensor. Raises UserError."""
    assert config.run.dir is not None and config.hf is not None
    run_dir, target = Path(config.run.dir), Path(config.hf)
    trained = load_trained(config)
    if trained.model.has_media:
        problem = "its model reads images or sound, which has no form there; only models of text can be exported"
        raise ConfigError("run.dir", config.run.dir, problem)
    folder = find_checkpoint(config.checkpoint.load or run_dir)
    manifest = read_manifest(folder)
    refuse_other_shapes(manifest, trained_shapes(trained), folder)
    _refuse_full("hf", target)
    shapes = logical_shapes(trained)
    family, disk_config = _disk_config(trained, run_dir / KEPT, config.family)
    if config.adapters:
        adapters, prefix = CheckpointReader.verified(folder, manifest), _prefix(run_dir / KEPT, family)
        dtype = _DTYPES.get(config.dtype) or manifest.kinds["weight"]
        export_adapters(target, adapters, trained, family, prefix, dtype, say)
        return
    there, on_disk = places(family, shapes, _prefix(run_dir / KEPT, family))
    reader, stored = open_merged(folder, manifest, trained)
    dtype = _DTYPES.get(config.dtype) or stored
    entries = [Entry(name, shape, dtype) for name, shape in on_disk.items()]
    parts = shards(entries, int(config.shard_gb * 1e9))
    total = len(parts)
    names = [f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
    names = names if total > 1 else [SINGLE]

    def values(part: list[Entry]) -> Iterator[Tensor]:
        for entry in part:
            out = torch.empty(entry.shape, dtype=TORCH_DTYPES[dtype])
            for name, place in there.items():
                if place.disk == entry.name:
                    whole = out.t() if place.transposed else out
                    rows = whole[place.before : place.before + shapes[name][0]]
                    reader.read("weight", name, Box((0,) * len(shapes[name]), shapes[name]), rows)
            yield out
            del out

    with new_folder(target) as temporary:
        if (run_dir / KEPT).is_dir():
            shutil.copytree(run_dir / KEPT, temporary, dirs_exist_ok=True, ignore=shutil.ignore_patterns(NAMES))
        if (tokenizer := tokenizer_in(run_dir)) is not None:
            copy_into(tokenizer, temporary)
        for name, part in zip(names, parts, strict=True):
            write_tensors(temporary / name, part, values(part), {"format": "pt"})
        _write_json(temporary / CONFIG, disk_config | _dtype_key(disk_config, dtype))
        if total > 1:
            _write_json(temporary / INDEX, index_of(names, parts))
    say(f"{sum(map(_numel, shapes.values())):,} parameters in {len(on_disk)} tensors, {dtype}, to {target}")


def refuse_other_shapes(manifest: Manifest, shapes: dict[str, tuple[int, ...]], folder: Path) -> None:
    """Raise UserError where a checkpoint does not hold these parameters and no others."""
    for name in manifest.parameters.keys() | shapes.keys():
        there = manifest.parameters[name].shape if name in manifest.parameters else None
        if there != shapes.get(name):
            raise UserError(f"{folder}: {name} has shape {there}, in the run's config.yaml {shapes.get(name)}")


def _disk_config(trained: TrainConfig, kept: Path, named: str | None) -> tuple[Family, dict[str, Any]]:
    """The family and config.json: that of the folder that was imported, where the model is still the same."""
    original: dict[str, Any] = {}
    if (kept / CONFIG).exists():
        family, original = read_config(kept)
        if named in (None, family.model_type) and in_full(trained.model) == in_full(to_model(model_keys(kept)[0])):
            return family, original
        named = named or family.model_type
    if named is not None and named not in families():
        raise ConfigError("family", named, f"no such family; there are {', '.join(families())}")
    problems = []
    for family in families().values() if named is None else [families()[named]]:
        try:
            about = {name: value for name, value in original.items() if name.endswith("_token_id")}
            return family, about | family.disk_config(trained.model, trained.train.seq_length)
        except UserError as error:
            problems.append(f"{error}")
    raise UserError(f"no family of Hugging Face's is known to have this model: {'; '.join(problems)}")


def _prefix(kept: Path, family: Family) -> str:
    try:
        found = json.loads((kept / NAMES).read_text(encoding="utf-8"))["prefix"]
    except (OSError, ValueError, KeyError, TypeError):
        found = None
    return found if found in family.prefixes else family.prefixes[0]


def _dtype_key(config: dict[str, Any], dtype: str) -> dict[str, str]:
    return {"torch_dtype" if "torch_dtype" in config else "dtype": _TORCH_NAMES[dtype]}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
