"""Reading a checkpoint into any layout: every rank reads the boxes of what it owns, wherever they were written."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from megapar.checkpoint.format import RESAVE, Manifest, StoredBox, find_checkpoint, key, read_manifest, verify_files
from megapar.checkpoint.hf.folder import is_hf_folder, open_weights
from megapar.checkpoint.hosts import Hosts, told, understood
from megapar.checkpoint.save import StatefulOptimizer, data_hashes, frozen_hashes
from megapar.checkpoint.slices import Slices
from megapar.config.errors import ConfigError, UserError, show
from megapar.config.keys import keys, value_of
from megapar.config.schema import TrainConfig
from megapar.config.tasks import TASKS
from megapar.parallel.agreement import all_or_none, gather_texts
from megapar.parallel.boxes import Box, PerBucket, owned_boxes
from megapar.parallel.buffers import StageBuffers
from megapar.parallel.carried import fits, move, put_back
from megapar.parallel.grad_sync import GradSync


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on: after `step` training steps, of which `skipped` did nothing, and `samples` samples."""

    folder: Path
    step: int
    samples: int
    skipped: int


def load(
    path: str | Path, optimizer: StatefulOptimizer, config: TrainConfig, *, sync: GradSync | None = None
) -> Resumed:
    """Bring the state of a checkpoint into an optimizer and its parameters. Collective over all ranks.

    path: a step folder, a folder of checkpoints or a run directory (the newest there). Layout, ZeRO and dtype may be
    others than those that wrote it: values are moved, and rounded only where this run's are narrower. sync: gets the
    error feedback, as `megapar.parallel.carried` says. Raises the same
    UserError on all ranks where a file is missing or changed, or model, optimizer or data order are not those of
    `config`.
    """
    buffers = optimizer.buffers
    folder, manifest = _open(path, buffers)
    with all_or_none(buffers.mesh["world"], buffers.mesh.device):
        refuse_other_model(manifest, config, folder)
        refuse_other_base(manifest, config, folder)
        refuse_other_optimizer(manifest, config, folder)
        refuse_other_order(manifest, config, folder)
    _fill(folder, manifest, buffers, optimizer.state())
    if sync is not None and manifest.carried:
        _fill_carried(CheckpointReader(folder, manifest), sync)
    optimizer.steps = manifest.optimizer_steps
    optimizer.publish()
    return Resumed(folder, manifest.step, manifest.samples, manifest.step - manifest.optimizer_steps)


def load_weights(path: str | Path, optimizer: StatefulOptimizer, config: TrainConfig) -> None:
    """Bring only the weights of a checkpoint, or of a Hugging Face folder, into an optimizer that has made no step, and
    its parameters.

    Collective, raises as `load` does, but the data may be others, and so may the model's last part, which then begins
    anew.
    """
    fill_weights(path, optimizer.buffers, optimizer.masters, config)
    optimizer.publish()


def load_parameters(path: str | Path, buffers: StageBuffers, config: TrainConfig) -> Manifest:
    """Bring only the weights of a checkpoint into a stage's parameters. Collective, raises as `load` does."""
    assert not buffers.zero, "weights are loaded whole"
    folder, manifest = _open(path, buffers)
    with all_or_none(buffers.mesh["world"], buffers.mesh.device):
        refuse_other_model(manifest, config, folder)
        refuse_other_base(manifest, config, folder)
    if adapted := config.model.lora.rank > 0:
        load_base(buffers, config)
    _fill(folder, manifest, buffers, {"weight": buffers.params}, anew=adapted)
    return manifest


def load_base(buffers: StageBuffers, config: TrainConfig) -> None:
    """Bring the frozen weights of a model with adapters into parameters, those of `model.lora.base`; where there is
    none they keep their initial values. Collective."""
    if config.model.lora.base is not None:
        fill_weights(config.model.lora.base, buffers, buffers.params, config)


def fill_weights(path: str | Path, buffers: StageBuffers, weights: Sequence[Tensor], config: TrainConfig) -> None:
    """Fill what a rank owns of every bucket, as `load_weights` does. Collective."""
    if is_hf_folder(path):
        with all_or_none(buffers.mesh["world"], buffers.mesh.device), torch.no_grad():
            found = open_weights(Path(path), config)
            for owned in owned_boxes(buffers):
                if found.shapes.get(owned.record.name) == owned.record.shape:
                    found.read(owned.record.name, owned.box, owned.view(weights))
        return
    folder, manifest = _open(path, buffers)
    with all_or_none(buffers.mesh["world"], buffers.mesh.device):
        refuse_other_model(manifest, config, folder, weights=True)
    _fill(
        folder, manifest, buffers, {"weight": weights}, anew=config.model.lora.rank > 0 or head_anew(manifest, config)
    )


def _open(path: str | Path, buffers: StageBuffers) -> tuple[Path, Manifest]:
    """The step folder that rank 0 finds, so that all ranks read the same one, and its manifest.

    Every file is hashed by one rank: rank 0 of R takes the first, the R-th after it, and so on.
    """
    world, device = buffers.mesh["world"], buffers.mesh.device
    found, folder, copies = "", Path(), False
    with all_or_none(world, device):
        if buffers.mesh.rank == 0:
            found = told(find_checkpoint(path))
    found = gather_texts(found, world, device)[0]
    with all_or_none(world, device):
        folder, copies = understood(found)
    if copies and (hosts := Hosts(folder.parents[1], buffers.mesh)).count > 1:
        return folder, hosts.complete(folder, buffers)
    with all_or_none(world, device):
        manifest = read_manifest(folder)
    with all_or_none(world, device):
        verify_files(folder, manifest, list(manifest.files)[buffers.mesh.rank :: world.size])
    return folder, manifest


def head_anew(manifest: Manifest, config: TrainConfig) -> bool:
    """Whether the last part is another one than in the checkpoint, as a classifier behind what predicted tokens."""
    then = manifest.config.get("model", {})
    return any(then.get(key, getattr(config.model, key)) != getattr(config.model, key) for key in ("output", "classes"))


def refuse_other_model(manifest: Manifest, config: TrainConfig, folder: Path, weights: bool = False) -> None:
    """Raise ConfigError where the checkpoint's weights mean something else in this config's model.

    weights: weights alone are taken, so the last part may be another one
    """
    known, free = keys(TrainConfig), set()
    if weights:
        if (manifest.config["model"].get("lora") or {}).get("rank"):
            problem = "holds adapters alone; `megapar export` that run merged, and give the folder that it writes"
            raise UserError(f"{folder}: {problem}")
        free = {key for key in known if key.startswith("model.lora.")}
        free |= {key for key, facts in known.items() if facts.head and head_anew(manifest, config)}
    _refuse_other(manifest, config, folder, lambda key: key.startswith("model.") and key not in free)
    if config.model.position == "learned":
        _refuse_other(manifest, config, folder, lambda key: key == "train.seq_length")  # rows of their table


def refuse_other_base(manifest: Manifest, config: TrainConfig, folder: Path) -> None:
    """Raise ConfigError where adapters were trained beside other weights than those of `model.lora.base`."""
    then, now = (manifest.data.get("base"), frozen_hashes(config).get("base"))
    if then != now:
        problem = f"{folder} has adapters of other weights ({then or 'none':.8} -> {now or 'none':.8}); give those"
        raise ConfigError("model.lora.base", config.model.lora.base, problem)


def refuse_other_optimizer(manifest: Manifest, config: TrainConfig, folder: Path) -> None:
    """Raise ConfigError where the checkpoint's state is another optimizer's."""
    saved = manifest.config.get("optim", {}).get("name", "adamw")  # before there was this key
    if config.optim.name != saved:
        problem = f"{folder} holds the state of another optimizer (saved {saved} -> now {config.optim.name})"
        remedy = f"use optim.name={saved}, or checkpoint.weights, which takes the weights alone"
        raise ConfigError("optim.name", config.optim.name, f"{problem}; {remedy}")


def refuse_other_order(manifest: Manifest, config: TrainConfig, folder: Path) -> None:
    """Raise ConfigError where this config would not go on with the data where the checkpoint's run stopped."""
    _refuse_other(manifest, config, folder, lambda key: not key.startswith("model."))
    tokens, stored = data_hashes(config.data.prefix).get("tokens"), manifest.data.get("tokens")
    if None not in (tokens, stored) and tokens != stored:
        problem = f"not the tokens that {folder} was trained on ({tokens:.8}..., there {stored:.8}...); use those"
        raise ConfigError("data.path", config.data.path, problem)


def _refuse_other(manifest: Manifest, config: TrainConfig, folder: Path, concerns: Callable[[str], bool]) -> None:
    """Raise ConfigError for a fixed key whose value is not the one that the checkpoint's run had."""
    for name, facts in keys(TrainConfig).items():
        if not facts.fixed or not concerns(name):
            continue
        try:
            stored = value_of(manifest.config, name)
        except (KeyError, TypeError):  # written before there was this key
            continue
        if (value := value_of(config, name)) != stored:
            raise ConfigError(name, value, f"{folder} was trained with {show(stored)}; {_remedy(config, name, stored)}")


def _remedy(config: TrainConfig, name: str, stored: Any) -> str:
    group, _, key = name.partition(".")
    needs = TASKS.get(config.task.name)
    if group == "model" and needs is not None and stored not in needs.model.get(key, (stored,)):
        return f"task.name={config.task.name} {needs.about} and can't use it; give weights of another model"
    return f"use {name}={show(stored)}" + ", or model=RUN for all of its model" * (group == "model")


def _fill(
    folder: Path,
    manifest: Manifest,
    buffers: StageBuffers,
    state: Mapping[str, Sequence[PerBucket]],
    anew: bool = False,
) -> None:
    """Read every owned box of every kind of state. Collective. anew: leave alone what the checkpoint does not have."""
    world, device = buffers.mesh["world"], buffers.mesh.device
    if not anew:
        _check_parameters(folder, manifest, buffers)
    reader = CheckpointReader(folder, manifest)
    with all_or_none(world, device), torch.no_grad():
        for owned in owned_boxes(buffers):
            stored = manifest.parameters.get(owned.record.name)
            if stored is None or stored.shape != owned.record.shape:
                continue  # of the last part
            for kind, parts in state.items():
                if (values := owned.part_of(parts)) is not None:
                    reader.read(kind, owned.record.name, owned.box, values)


def _fill_carried(reader: "CheckpointReader", sync: GradSync) -> None:
    """Put error feedback back where every rank finds its own, else move it. Collective."""
    world, device = sync.mesh["world"], sync.mesh.device
    stored = {
        kind: {name: (one.shape, {part.box for part in one.boxes}) for name, one in table.items()}
        for kind, table in reader.manifest.carried.items()
    }
    same = all(text == "1" for text in gather_texts(str(int(fits(sync, stored))), world, device))
    with all_or_none(world, device), torch.no_grad():
        if same:
            put_back(sync, reader.read)
        else:
            move(sync, stored, reader.read)


def _check_parameters(folder: Path, manifest: Manifest, buffers: StageBuffers) -> None:
    """Refuse parameters that only the model or only the checkpoint has, or in another shape. Collective."""
    world, device = buffers.mesh["world"], buffers.mesh.device
    records = {held.piece.record.name: held.piece.record for held in buffers.held()}
    remedy = "it is of another model; use the config it was trained with"
    with all_or_none(world, device):
        for name, record in records.items():
            stored = manifest.parameters.get(name)
            if stored is None:
                raise UserError(f"{folder}: has no parameter {name}; {remedy}")
            if stored.shape != record.shape:
                here, there = list(record.shape), list(stored.shape)
                raise UserError(f"{folder}: parameter {name} has shape {there}, the model's has {here}; {remedy}")
    held = {name for text in gather_texts("\n".join(records), world, device) for name in text.split("\n")}
    foreign = sorted(manifest.parameters.keys() - held)
    if foreign:
        raise UserError(f"{folder}: the model has no parameter {foreign[0]}; {remedy}")


class CheckpointReader:
    """Reads boxes of logical parameters from the files of a checkpoint, which are verified already (`verify_files`).

    bytes_read: of tensors, from the files.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest, self.bytes_read = folder, manifest, 0
        self._files: dict[str, Slices] = {}

    @classmethod
    def verified(cls, folder: Path, manifest: Manifest) -> "CheckpointReader":
        """The reader of a checkpoint whose files are hashed here, by one process. Raises UserError."""
        verify_files(folder, manifest)
        return cls(folder, manifest)

    def has(self, kind: str, name: str) -> bool:
        """Whether a parameter has state of this kind: of some optimizers' not every one has. Raises UserError."""
        if kind not in self.manifest.kinds or name not in self.manifest.table(kind):
            return False
        first = self.manifest.table(kind)[name].boxes[0]
        return key(kind, name, first.box) in self._file(first.file)

    def read(self, kind: str, name: str, box: Box, out: Tensor) -> None:
        """Fill `out` [box.shape] with a box of a parameter. Raises UserError."""
        if kind not in self.manifest.kinds or name not in self.manifest.table(kind):
            raise UserError(f"{self.folder}: holds no {kind} of {name}; {RESAVE}")
        missing = box.numel
        for stored in self.manifest.table(kind)[name].boxes:
            common = box.overlap(stored.box)
            if common is not None:
                for piece in common.pieces():
                    self._read(kind, name, stored, piece, out[piece.within(box)])
                missing -= common.numel
        if missing:
            raise UserError(f"{self.folder}: {missing} values of {name} are in no file or in two; {RESAVE}")

    def _read(self, kind: str, name: str, stored: StoredBox, wanted: Box, out: Tensor) -> None:
        file, tensor = self._file(stored.file), key(kind, name, stored.box)
        try:
            if file.facts(tensor) != (stored.box.shape, self.manifest.kinds[kind]):
                raise SafetensorError("another shape or dtype than in the manifest")
            self.bytes_read += file.read(tensor, wanted.within(stored.box), out)
        except (SafetensorError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"{self.folder / stored.file}: {kind} of {name}: {reason}; {RESAVE}") from None

    def _file(self, name: str) -> Slices:
        if name not in self._files:
            try:
                self._files[name] = Slices(self.folder / name)
            except (SafetensorError, OSError) as error:
                reason = error.strerror if isinstance(error, OSError) else error
                raise UserError(f"{self.folder / name}: can't be read ({reason}); {RESAVE}") from None
        return self._files[name]
