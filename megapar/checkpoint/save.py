"""Writing a checkpoint: complete under its final name, or not there at all."""

import hashlib
import json
import os
import platform
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.numpy import save_file
from torch import Tensor

import megapar
from megapar.checkpoint.format import (
    LATEST,
    MANIFEST,
    STEP_FOLDER,
    UNFINISHED,
    Manifest,
    StoredBox,
    StoredFile,
    StoredParameter,
    file_facts,
    find_checkpoint,
    key,
    manifest_text,
)
from megapar.checkpoint.hf.folder import is_hf_folder
from megapar.config.errors import UserError
from megapar.config.parse import to_dict
from megapar.config.schema import TrainConfig
from megapar.files import follow_umask
from megapar.parallel.agreement import all_or_none, gather_texts
from megapar.parallel.boxes import Box, PerBucket, owned_boxes
from megapar.parallel.buffers import StageBuffers

DTYPES = {torch.float32: "F32", torch.float64: "F64"}


class StatefulOptimizer(Protocol):
    """What a checkpoint needs of an optimizer.

    masters: the weights that it updates, what this rank owns of every bucket, in fp32 or fp64
    state: by kind, what this rank owns of every bucket likewise; "weight" are the masters, and another kind may be of
        some parameters alone
    publish: brings the master weights into the parameters. Collective.
    """

    buffers: StageBuffers
    masters: list[Tensor]
    steps: int

    def state(self) -> Mapping[str, Sequence[PerBucket]]: ...
    def publish(self) -> None: ...


def save(folder: Path, optimizer: StatefulOptimizer, config: TrainConfig, step: int) -> Path:
    """Write the state after training step `step` to `folder`/step-STEP and return that path. Collective over all ranks.

    folder: of checkpoints, the same on every rank's machine; made where it is missing. Every rank writes what it owns
    (without ZeRO-1 only data-parallel rank 0). Raises the same UserError on all ranks where one could not write; what
    was there before is then as it was.
    """
    mesh = optimizer.buffers.mesh
    world, device = mesh["world"], mesh.device
    final = folder / f"step-{step:08d}"
    nonce = gather_texts(secrets.token_hex(4), world, device)[0]
    temporary = folder / f"{final.name}{UNFINISHED}{nonce}"
    try:
        with all_or_none(world, device):
            if mesh.rank == 0:
                begin(folder, temporary)
        with all_or_none(world, device):
            part = _write_part(temporary, optimizer, mesh.rank)
        parts = [json.loads(text) for text in gather_texts(json.dumps(part), world, device)]
        with all_or_none(world, device):
            if mesh.rank == 0:
                finish(temporary, final, _manifest(parts, optimizer, config, step))
    except UserError:
        if mesh.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def keep_newest(folder: Path, count: int) -> list[str]:
    """Remove all but the newest `count` step folders, and never the one that `latest` names. Returns what failed.

    A folder first loses its name, so that what has a name is whole; the next save sweeps what a crash leaves of it.
    """
    problems = []
    steps = [path for path in folder.glob("step-*") if STEP_FOLDER.fullmatch(path.name) and (path / MANIFEST).exists()]
    kept = {*sorted(steps, key=lambda path: int(path.name[5:]))[-count:], find_checkpoint(folder)}
    for path in sorted(set(steps) - kept):
        nameless = folder / f"{path.name}{UNFINISHED}{secrets.token_hex(4)}-former"
        try:
            os.rename(path, nameless)
            shutil.rmtree(nameless)
        except OSError as error:
            problems.append(f"checkpoint.keep={count}: {path} can't be removed ({error.strerror}); remove it by hand")
    return problems


def begin(folder: Path, temporary: Path) -> None:
    """Sweep what crashes have left behind and make the folder to write to."""
    with _writing(temporary):
        folder.mkdir(parents=True, exist_ok=True)
        for left_over in folder.glob(f"step-*{UNFINISHED}*"):
            shutil.rmtree(left_over, ignore_errors=True)
        temporary.mkdir()


def _write_part(temporary: Path, optimizer: StatefulOptimizer, rank: int) -> dict[str, Any]:
    """Write what this rank owns and counts. Returns what the manifest needs to know of it."""
    buffers, state = optimizer.buffers, optimizer.state()
    part: dict[str, Any] = {"steps": optimizer.steps, "boxes": [], "file": None}
    if not (buffers.mesh.first_copy if buffers.zero else buffers.mesh.first_replica):
        return part
    tensors = {}
    for owned in owned_boxes(buffers):
        if owned.counted:
            part["boxes"].append([owned.record.name, owned.record.shape, owned.box.offset, owned.box.shape])
            for kind, parts in state.items():
                if (values := owned.part_of(parts)) is not None:
                    tensors[key(kind, owned.record.name, owned.box)] = values.detach().cpu().numpy()
    if tensors:
        path = temporary / f"rank-{rank:05d}.safetensors"
        with _writing(path):
            save_file(tensors, path)
            follow_umask(path)
            _sync(path)
            facts = file_facts(path)
        part["file"] = [path.name, facts.size, facts.sha256]
    return part


def _manifest(parts: list[dict[str, Any]], optimizer: StatefulOptimizer, config: TrainConfig, step: int) -> Manifest:
    parameters: dict[str, StoredParameter] = {}
    for part in parts:
        for name, shape, offset, size in part["boxes"]:
            stored = parameters.setdefault(name, StoredParameter(tuple(shape), []))
            stored.boxes.append(StoredBox(part["file"][0], Box(tuple(offset), tuple(size))))
    return Manifest(
        step=step,
        optimizer_steps=max(part["steps"] for part in parts),
        samples=step * config.train.global_batch_size,
        seed=config.train.seed,
        layout=str(config.parallel.layout),
        config=to_dict(config),
        environment=environment(),
        kinds=dict.fromkeys(optimizer.state(), DTYPES[optimizer.buffers.context.wide_dtype]),
        parameters=parameters,
        files={
            name: StoredFile(size, sha256) for name, size, sha256 in (part["file"] for part in parts if part["file"])
        },
        data=data_hashes(config.data.prefix) | base_hash(config),
    )


def environment() -> dict[str, str]:
    """Versions of what writes a checkpoint."""
    return {"megapar": megapar.__version__, "torch": torch.__version__, "python": platform.python_version()}


def finish(temporary: Path, final: Path, manifest: Manifest) -> None:
    """Write the manifest, give the folder its final name, point `latest` to it: each durable before the next."""
    for name, facts in manifest.files.items():
        path = temporary / name
        if not path.exists() or path.stat().st_size != facts.size:
            raise UserError(f"{path}: written by another rank but not seen by rank 0; use a folder all machines share")
    with _writing(temporary):
        _write(temporary / MANIFEST, manifest_text(manifest))
        _sync(temporary)
        if final.exists():  # of a run that went this way before: step aside, and away with it
            former = temporary.with_name(f"{temporary.name}-former")
            os.rename(final, former)
            os.rename(temporary, final)
            shutil.rmtree(former, ignore_errors=True)
        else:
            os.rename(temporary, final)
        _sync(final.parent)
    with _writing(final.parent / LATEST):
        pointer = final.parent / f"{LATEST}{UNFINISHED}{temporary.name[-8:]}"
        _write(pointer, final.name + "\n")
        os.replace(pointer, final.parent / LATEST)
        _sync(final.parent)


def _write(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    """Make a file, or the names in a folder, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn failures of writing into one line that names the path and the system's reason."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(
            f"{path}: the checkpoint can't be written ({reason}); make room, or use another run.dir"
        ) from None


def base_hash(config: TrainConfig) -> dict[str, str]:
    """SHA-256 of what describes the frozen weights of a model with adapters: a checkpoint's manifest, which has its
    files' hashes; of a Hugging Face folder names, sizes and config.json. Empty where there are none."""
    path = config.model.lora.base if config.model.lora.rank else None
    if path is None:
        return {}
    if not is_hf_folder(path):
        return {"base": hashlib.sha256((find_checkpoint(path) / MANIFEST).read_bytes()).hexdigest()}
    files = sorted((file.name, file.stat().st_size) for file in Path(path).glob("*.safetensors"))
    return {"base": hashlib.sha256(repr(files).encode() + (Path(path) / "config.json").read_bytes()).hexdigest()}


def data_hashes(prefix: str | None) -> dict[str, str]:
    """SHA-256 of the token file and of the tokenizer, from the manifest beside them; empty where there is none."""
    try:
        files = json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8"))["files"]
        named = {".bin": "tokens", ".tokenizer.json": "tokenizer", ".model": "tokenizer"}
        return {name: files[ending]["sha256"] for ending, name in named.items() if ending in files}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
