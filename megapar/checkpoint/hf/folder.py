"""A Hugging Face folder: its config.json, and its weights in slices under our names."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megapar.checkpoint.hf.family import LAYER, PREFIX, Family, Keys, families, in_full, same, to_model
from megapar.checkpoint.slices import Slices
from megapar.config.check import with_layout
from megapar.config.errors import ConfigError, UserError, show
from megapar.config.keys import changed, keys
from megapar.config.layout import Layout
from megapar.config.model_schema import LoraConfig
from megapar.config.schema import ModelConfig, TrainConfig
from megapar.config.stages import ties
from megapar.mesh import Mesh
from megapar.models.stage import build_stage
from megapar.parallel.boxes import Box
from megapar.parallel.context import StageContext

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
CODE = "auto_map"  # in config.json: classes that are in the folder itself
QUANTIZED = "quantization_config"
HEAD = {name for name, facts in keys(ModelConfig).items() if facts.head}  # what the last part is made of
LOGICAL_LAYER = re.compile(r"^((?:encoder\.)?layers)\.(\d+)\.")


def is_hf_folder(path: str | Path) -> bool:
    """Whether a folder is one of Hugging Face's rather than a run's or a checkpoint."""
    path = Path(path)
    return (path / CONFIG).is_file() and not (path / "config.yaml").exists()


def read_config(folder: Path) -> tuple[Family, dict[str, Any]]:
    """The family and the content of a folder's config.json. Raises UserError, one line."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: missing; give a folder with config.json and model.safetensors") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: can't be read as JSON ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: is no JSON object; give a folder that transformers has saved")
    if CODE in config:
        raise UserError(f"{path}: {CODE} names code of the folder's own, which is never run; give a folder without it")
    if config.get(QUANTIZED):
        raise UserError(
            f"{path}: {QUANTIZED}: quantized weights are not read; give a folder with those in bf16 or fp32"
        )
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in families():
        known = ", ".join(families())
        raise UserError(f"{path}: model_type={kind!r} is not known; there are {known}")
    family, named = families()[kind], config.get("architectures")
    if isinstance(named, list):
        named = named[0] if named else None
    if named is not None and named not in (family.architecture, *family.others):
        known = ", ".join((family.architecture, *family.others))
        raise UserError(f"{path}: architectures={named} is not supported; of {kind} there are {known}")
    return family, config


def model_keys(folder: Path) -> tuple[Keys, int]:
    """Keys of `model` for a folder's weights, and the most positions. Raises UserError, one line."""
    family, config = read_config(folder)
    try:
        keys = family.model_keys(config)
        if family.untied_by is not None and (names := _tensor_names(folder)):
            keys["tied"] = family.untied_by not in names
        length = int(config.get(family.length) or family.default_length)
    except UserError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        problem = f"{type(error).__name__} ({error}); is it one of {family.model_type}?"
        raise UserError(f"{folder / CONFIG}: {problem}") from None
    return {name: value for name, value in keys.items() if value is not None}, length


def _tensor_names(folder: Path) -> set[str]:
    """What a folder's files of weights hold; empty without them. Raises UserError."""
    if not (folder / INDEX).exists() and not (folder / SINGLE).exists():
        return set()
    return {name for file in file_names(folder) for name in read_header(folder / file)}


def logical_shapes(config: TrainConfig) -> dict[str, tuple[int, ...]]:
    """Every logical parameter of a resolved config's model, without adapters, in the order of a forward pass. Takes no
    memory."""
    return _shapes(changed(config, {"model.lora": LoraConfig()}))


def trained_shapes(config: TrainConfig) -> dict[str, tuple[int, ...]]:
    """Those that a run trains, and that its checkpoints hold: with LoRA the adapters."""
    return _shapes(config)


def _shapes(config: TrainConfig) -> dict[str, tuple[int, ...]]:
    config = with_layout(config, Layout())
    context = StageContext(Mesh(groups=False), frozen=config.model.lora.rank > 0)
    for name, (stages, part) in ties(config).items():
        context.tie(name, stages, part)
    build_stage(config, context)
    trained = [local for local in context.parameters if not local.frozen]
    return {piece.record.name: piece.record.shape for local in trained for piece in local.pieces}


def open_weights(folder: Path, config: TrainConfig) -> "HfWeights":
    """The weights of a folder for a resolved config's model, whose last part may be another one. Raises ConfigError
    where the model is."""
    said, length = model_keys(folder)
    theirs, ours = in_full(to_model(said)), in_full(config.model)
    anew = theirs["output"] != ours["output"]
    for name, value in theirs.items():
        if not same(value, ours.get(name, value)) and not (anew and name in HEAD):
            problem = f"{folder} has model.{name}={show(value)}; use model={folder}"
            raise ConfigError(f"model.{name}", ours[name], problem)
    if config.model.position == "learned" and config.train.seq_length != length:
        problem = f"{folder} has a table of {length} learned positions; use train.seq_length={length}"
        raise ConfigError("train.seq_length", config.train.seq_length, problem)
    if anew:
        config = changed(config, {f"model.{name}": theirs[name] for name in HEAD if name in theirs})
    return HfWeights(folder, logical_shapes(config))


@dataclass(frozen=True)
class OnDisk:
    """Where a logical parameter is: a tensor, the rows of it before ours (columns of a transposed one)."""

    disk: str
    before: int
    transposed: bool


def places(
    family: Family, shapes: Mapping[str, tuple[int, ...]], prefix: str
) -> tuple[dict[str, OnDisk], dict[str, tuple[int, ...]]]:
    """Where every logical parameter is, and the shapes of the tensors on disk. Raises UserError for a parameter that
    the family has no place for."""
    gated = any(name.endswith(".mlp.gate.weight") for name in shapes)
    by_name = {name: one for one in family.tensors if one.gated in (None, gated) for name in one.ours}
    found, on_disk = {}, {}
    for name, shape in shapes.items():
        layer = match[2] if (match := LOGICAL_LAYER.match(name)) else ""
        stored = by_name.get(LOGICAL_LAYER.sub(rf"\1.{LAYER}.", name))
        if stored is None:
            raise UserError(f"{family.model_type} has no place for the parameter {name}")
        mates = [one.replace(LAYER, layer) for one in stored.ours]
        if missing := [one for one in mates if one not in shapes]:
            raise UserError(f"{family.model_type} has {', '.join(mates)} in one tensor; this model has no {missing[0]}")
        rows = [shapes[one][0] for one in mates]
        disk = stored.disk.replace(LAYER, layer).replace(PREFIX, prefix)
        whole = (sum(rows), *shape[1:])
        on_disk[disk] = whole[::-1] if stored.transposed else whole
        found[name] = OnDisk(disk, sum(rows[: mates.index(name)]), stored.transposed)
    return found, on_disk


@dataclass(frozen=True)
class Header:
    """A tensor of a safetensors file as its header says it. actual: its name there."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    actual: str


class HfWeights:
    """The weights of a folder, read in boxes of logical parameters. read_bytes: of all boxes so far.

    shapes: of every logical parameter of the model. Raises UserError, one line, where a tensor is missing, one too many
    or of another shape; only headers are read for that.
    """

    def __init__(self, folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.folder, self.shapes, self.read_bytes = folder, shapes, 0
        self.family, self.config = read_config(folder)
        self.headers = self._headers()
        self.prefix = self._prefix()
        self.places, on_disk = places(self.family, shapes, self.prefix)
        self._files: dict[str, Slices] = {}
        self._refuse_other(on_disk, tied="head.weight" not in shapes)

    @property
    def dtype(self) -> str:
        """Of most of the weights, as safetensors names it."""
        kinds = [header.dtype for header in self.headers.values()]
        return max(set(kinds), key=kinds.count)

    def read(self, name: str, box: Box, out: Tensor) -> None:
        """Fill out [box.shape] with a box of a logical parameter. Raises UserError."""
        for piece in box.pieces():
            self._read(self.places[name], piece, out[piece.within(box)])

    def _read(self, place: OnDisk, box: Box, out: Tensor) -> None:
        header = self.headers[place.disk]
        ranges = [slice(start, start + length) for start, length in zip(box.offset, box.shape, strict=True)]
        ranges[0] = slice(ranges[0].start + place.before, ranges[0].stop + place.before)
        index = tuple(reversed(ranges)) if place.transposed else tuple(ranges)
        try:
            if header.file not in self._files:
                self._files[header.file] = Slices(self.folder / header.file)
            read = self._files[header.file].read(header.actual, index, out, transposed=place.transposed)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.folder / header.file}: {header.actual}: {error}; download it again") from None
        self.read_bytes += read

    def _headers(self) -> dict[str, Header]:
        """By today's names."""
        found: dict[str, Header] = {}
        for file in file_names(self.folder):
            for actual, facts in read_header(self.folder / file).items():
                name = actual
                for pattern, newer in self.family.renamed:
                    name = re.sub(pattern, newer, name)
                if name in found:
                    raise UserError(f"{self.folder}: {actual} is in {found[name].file} and in {file}; keep one of them")
                found[name] = Header(file, tuple(facts["shape"]), facts["dtype"], actual)
        return found

    def _prefix(self) -> str:
        first = self.family.tensors[0].disk
        for prefix in self.family.prefixes:
            if first.replace(PREFIX, prefix) in self.headers:
                return prefix
        return self.family.prefixes[0]

    def _refuse_other(self, on_disk: Mapping[str, tuple[int, ...]], tied: bool) -> None:
        of = f"a {self.family.model_type} of this {CONFIG}"
        for name, shape in on_disk.items():
            if name not in self.headers:
                raise UserError(f"{self.folder}: has no tensor {name}, which {of} has")
            there, dtype = self.headers[name].shape, self.headers[name].dtype
            if dtype not in TORCH_DTYPES:
                raise UserError(f"{self.folder}: tensor {name} is {dtype}, and weights are {', '.join(TORCH_DTYPES)}")
            if there != shape:
                raise UserError(f"{self.folder}: tensor {name} has shape {list(there)}, and {of} {list(shape)}")
        ignored = list(self.family.ignored)
        if tied:  # a copy of the embedding, or of what a model without logits does not have
            ignored += [re.escape(stored.disk) for stored in self.family.tensors if stored.ours == ("head.weight",)]
        for name in self.headers.keys() - on_disk.keys():
            if not any(re.fullmatch(pattern, name) for pattern in ignored):
                raise UserError(f"{self.folder}: has a tensor {self.headers[name].actual}, and {of} has none")


def file_names(folder: Path) -> list[str]:
    """The files of a folder's weights. Raises UserError where there are none."""
    index = folder / INDEX
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index}: can't be read ({type(error).__name__}: {error})") from None
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise UserError(f"{index}: {name!r} is no name of a file in the folder")
        return names
    if (folder / SINGLE).exists():
        return [SINGLE]
    pickled = sorted(path.name for path in folder.glob("*.bin") if path.name.startswith("pytorch_model"))
    if pickled:
        raise UserError(f"{folder / pickled[0]}: pickled weights are never loaded; convert them: {CONVERT}")
    raise UserError(f"{folder}: holds neither {SINGLE} nor {INDEX}; give a folder with weights")


CONVERT = (
    "python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('DIR').save_pretrained('NEW')\""
)


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Shapes and dtypes of a safetensors file's tensors. Raises UserError."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: {"shape": one.get_shape(), "dtype": one.get_dtype()} for name, one in slices.items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: can't be read ({error}); download it again") from None


TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
