"""Writing a checkpoint: complete under its final name, or not there at all."""

import hashlib
import json
import os
import platform
import secrets
import shutil
import threading
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

import megapar
from megapar.checkpoint.format import (
    LATEST,
    MANIFEST,
    UNFINISHED,
    Manifest,
    StoredBox,
    StoredFile,
    StoredParameter,
    find_checkpoint,
    key,
    latest_name,
    manifest_text,
    newest_first,
    read_manifest,
    shard,
)
from megapar.checkpoint.hf.folder import is_hf_folder
from megapar.checkpoint.hf.write import Entry, stream_tensors
from megapar.checkpoint.hosts import Hosts
from megapar.config.errors import UserError
from megapar.config.parse import to_dict
from megapar.config.schema import TrainConfig
from megapar.config.tasks import has_reference
from megapar.parallel.agreement import all_or_none, gather_texts
from megapar.parallel.boxes import Box, PerBucket, owned_boxes
from megapar.parallel.buffers import StageBuffers
from megapar.parallel.carried import carried_boxes
from megapar.parallel.grad_sync import GradSync

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


class HostCopies:
    """Host memory for what a rank writes, taken once and used for every save; pinned for a GPU's state."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}

    def of(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies. Those of a GPU's tensors are there once what its stream has been given so far is done."""
        found = {}
        for name, tensor in tensors.items():
            copy = self._tensors.get(name)
            if copy is None or (copy.shape, copy.dtype) != (tensor.shape, tensor.dtype):
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            found[name] = copy.copy_(tensor.detach(), non_blocking=True)
        self._tensors = found  # and memory of what is not there any more goes
        return found


class Saving:
    """A checkpoint that is being written. All is collective but `write`, which may run in another thread.

    Making one takes hold of the state after training step `step`; host: memory for a copy of it, and the state may
    change from then on; None: it is written as it stands. hosts: with folders of copies, `folder` is that of this
    rank's, and each file is also given to the next host. See `save` for the others. Raises as `save` does.
    """

    def __init__(
        self,
        folder: Path,
        optimizer: StatefulOptimizer,
        config: TrainConfig,
        step: int,
        *,
        sync: GradSync | None = None,
        tokens: int | None = None,
        host: HostCopies | None = None,
        hosts: Hosts | None = None,
    ) -> None:
        self.mesh = optimizer.buffers.mesh
        self.world, self.device = self.mesh["world"], self.mesh.device
        self.final = folder / f"step-{step:08d}"
        nonce = gather_texts(secrets.token_hex(4), self.world, self.device)[0]
        self.temporary = folder / f"{self.final.name}{UNFINISHED}{nonce}"
        self._problem: Exception | None = None
        self._facts: StoredFile | None = None
        self._hosts = hosts if hosts is not None and hosts.count > 1 else None
        self._leads = self.mesh.rank == 0 if self._hosts is None else self._hosts.leads
        with self._abandoned(), all_or_none(self.world, self.device):
            if self._leads:
                begin(folder, self.temporary, self._pass, parents=hosts is None)
        self._part = part = _Part(optimizer, sync)
        dtype = DTYPES[optimizer.buffers.context.wide_dtype]
        kinds = dict.fromkeys(optimizer.state(), dtype)
        self._config = config
        self._manifest = partial(_manifest, kinds=kinds, dtype=dtype, config=config, step=step, tokens=tokens)
        self._values = part.tensors if host is None else host.of(part.tensors)
        self._copied = None
        if host is not None and self.device.type == "cuda":
            self._copied = torch.cuda.Event()
            self._copied.record()

    def write(self) -> None:
        """Write this rank's file and make it durable. What goes wrong is kept for `finish`."""
        try:
            if self._copied is not None:
                self._copied.synchronize()
            if self._values:
                path = self.temporary / shard(self.mesh.rank)
                with writing(path):
                    self._pass("begin of a file")
                    self._facts = write_file(path, self._values, self._pass)
                    self._pass("end of a file")
        except Exception as error:
            self._problem = error

    def finish(self) -> Path:
        """Once every rank's `write` has returned: give the checkpoint its name. Returns its path."""
        if self._problem is not None and not isinstance(self._problem, UserError):
            raise self._problem
        with self._abandoned():
            part = self._part.facts | {"file": None if self._facts is None else vars(self._facts)}
            with all_or_none(self.world, self.device):
                if self._problem is not None:
                    raise self._problem
                if self.mesh.rank == 0:  # what every host's manifest says
                    data = data_hashes(self._config.data.prefix) | frozen_hashes(self._config)
                    part |= {"environment": environment(), "data": data}
            parts = [json.loads(text) for text in gather_texts(json.dumps(part), self.world, self.device)]
            elsewhere: set[str] = set()
            if self._hosts is not None:
                self._pass("copies to the next host")
                files = {part["rank"]: StoredFile(**part["file"]) for part in parts if part["file"]}
                self._hosts.to_neighbours({rank: (shard(rank), facts) for rank, facts in files.items()}, self.temporary)
                elsewhere = {shard(rank) for rank in files if not self._hosts.keeps(rank)}
            with all_or_none(self.world, self.device):
                if self._leads:
                    finish(self.temporary, self.final, self._manifest(parts), self._pass, elsewhere)
        return self.final

    def _pass(self, point: str) -> None:
        """Say where this save is. The board is the main thread's."""
        if threading.current_thread() is threading.main_thread():
            self.mesh.timeline.passing("save", point)
        else:
            self.mesh.timeline.tell("save", point)

    @contextmanager
    def _abandoned(self) -> Iterator[None]:
        """Leave nothing behind of a checkpoint that could not be written."""
        try:
            yield
        except UserError:
            if self._leads:
                shutil.rmtree(self.temporary, ignore_errors=True)
            raise


def save(
    folder: Path,
    optimizer: StatefulOptimizer,
    config: TrainConfig,
    step: int,
    *,
    sync: GradSync | None = None,
    tokens: int | None = None,
) -> Path:
    """Write the state after training step `step` to `folder`/step-STEP and return that path. Collective over all ranks.

    folder: of checkpoints, the same on every rank's machine; made where it is missing. Every rank writes what it owns
    (without ZeRO-1 only data-parallel rank 0). sync: whose error feedback is part of the state; tokens: seen so far.
    Raises the same UserError on all ranks where one could not write; what was there before is then as it was.
    """
    saving = Saving(folder, optimizer, config, step, sync=sync, tokens=tokens)
    saving.write()
    return saving.finish()


def _nothing(point: str) -> None:
    pass


def write_file(path: Path, tensors: Mapping[str, Tensor], at: Callable[[str], None] = _nothing) -> StoredFile:
    """Write tensors of any device to a file, one after the other. at: told where it is. Raises OSError."""

    def values() -> Iterator[Tensor]:
        for tensor in tensors.values():
            at("tensor of a file")
            yield tensor.detach().cpu()

    entries = [Entry(name, tuple(tensor.shape), DTYPES[tensor.dtype]) for name, tensor in tensors.items()]
    return stream_tensors(path, entries, values(), {})


def keep_newest(folder: Path, count: int, spread: bool = False) -> list[str]:
    """Remove all but the newest `count` whole step folders, and never the one that `latest` names. Returns what failed.

    Called behind a save: `latest` names what this run has just written, hashed on the way. Whole: the manifest is good
    and each file has its size. What is damaged doesn't count, and stays. A folder first loses its name, so that what
    has a name is whole; the next save sweeps what a crash leaves of it. spread: files may also be on other hosts.
    """
    problems = []
    whole = newest_first(folder) if spread else filter(_whole, newest_first(folder))
    steps = sorted(whole, key=lambda path: int(path.name[5:]))
    for path in (path for path in steps[:-count] if path.name != latest_name(folder)):
        nameless = folder / f"{path.name}{UNFINISHED}{secrets.token_hex(4)}-former"
        try:
            os.rename(path, nameless)
            shutil.rmtree(nameless)
        except OSError as error:
            problems.append(f"checkpoint.keep={count}: {path} can't be removed ({error.strerror}); remove it by hand")
    return problems


def _whole(folder: Path) -> bool:
    try:
        files = read_manifest(folder).files
        return all((folder / name).stat().st_size == facts.size for name, facts in files.items())
    except (UserError, OSError):
        return False


def begin(folder: Path, temporary: Path, at: Callable[[str], None] = _nothing, *, parents: bool = True) -> None:
    """Sweep what crashes have left behind and make the folder to write to. parents: those of `folder`, too, which may
    not come back where they are removed as a launcher is gone."""
    with writing(temporary):
        at("sweep")
        folder.mkdir(parents=parents, exist_ok=True)
        for left_over in folder.glob(f"step-*{UNFINISHED}*"):
            shutil.rmtree(left_over, ignore_errors=True)
        temporary.mkdir()


class _Part:
    """What this rank owns and counts. tensors: by their names in the file; facts: what the manifest needs to know."""

    def __init__(self, optimizer: StatefulOptimizer, sync: GradSync | None) -> None:
        buffers, state = optimizer.buffers, optimizer.state()
        self.tensors: dict[str, Tensor] = {}
        boxes: list[list[Any]] = []
        if buffers.mesh.first_copy if buffers.zero else buffers.mesh.first_replica:
            for owned in owned_boxes(buffers):
                if owned.counted:
                    boxes.append([owned.record.name, owned.record.shape, owned.box.offset, owned.box.shape])
                    for kind, parts in state.items():
                        if (values := owned.part_of(parts)) is not None:
                            self.tensors[key(kind, owned.record.name, owned.box)] = values
        self.facts = {
            "rank": buffers.mesh.rank,
            "steps": optimizer.steps,
            "boxes": boxes,
            "carried": [] if sync is None else self._carried(sync),
        }

    def _carried(self, sync: GradSync) -> list[list[Any]]:
        carried, boxes = sync.carried(), []
        sizes = [{kind: len(values) for kind, values in kinds.items()} for kinds in carried]
        if not any(sizes) or not sync.mesh.first_copy:
            return []
        for one in carried_boxes(sync, sizes):
            if one.counted:
                boxes.append([one.kind, one.name, one.shape, one.box.offset, one.box.shape])
                values = carried[one.bucket][one.kind][one.run]
                self.tensors[key(one.kind, one.name, one.box)] = values.view(one.box.shape)
        return boxes


def _manifest(
    parts: list[dict[str, Any]],
    *,
    kinds: Mapping[str, str],
    dtype: str,
    config: TrainConfig,
    step: int,
    tokens: int | None,
) -> Manifest:
    """kinds: of the optimizer's state, with dtypes; dtype: of what is carried."""
    parameters: dict[str, StoredParameter] = {}
    carried: dict[str, dict[str, StoredParameter]] = {}
    for part in parts:
        file = shard(part["rank"])
        rows = [(parameters, row) for row in part["boxes"]]
        rows += [(carried.setdefault(kind, {}), row) for kind, *row in part["carried"]]
        for table, (name, shape, offset, size) in rows:
            stored = table.setdefault(name, StoredParameter(tuple(shape), []))
            stored.boxes.append(StoredBox(file, Box(tuple(offset), tuple(size))))
    return Manifest(
        step=step,
        optimizer_steps=max(part["steps"] for part in parts),
        samples=step * config.train.global_batch_size,
        seed=config.train.seed,
        layout=str(config.parallel.layout),
        config=to_dict(config),
        environment=parts[0]["environment"],
        kinds={**kinds, **dict.fromkeys(carried, dtype)},
        parameters=parameters,
        files={shard(part["rank"]): StoredFile(**part["file"]) for part in parts if part["file"]},
        data=parts[0]["data"],
        tokens=tokens,
        carried=carried,
    )


def environment() -> dict[str, str]:
    """Versions of what writes a checkpoint."""
    return {"megapar": megapar.__version__, "torch": torch.__version__, "python": platform.python_version()}


def finish(
    temporary: Path,
    final: Path,
    manifest: Manifest,
    at: Callable[[str], None] = _nothing,
    elsewhere: Container[str] = (),
) -> None:
    """Write the manifest, give the folder its final name, point `latest` to it: each durable before the next. at: told
    where it is; elsewhere: files that need not be in the folder."""
    for name, facts in manifest.files.items():
        if name in elsewhere:
            continue
        path = temporary / name
        if not path.exists() or path.stat().st_size != facts.size:
            raise UserError(f"{path}: written by another rank but not seen by rank 0; use a folder all machines share")
    with writing(temporary):
        at("manifest")
        _write(temporary / MANIFEST, manifest_text(manifest))
        sync(temporary)
        at("rename")
        if final.exists():  # of a run that went this way before: step aside, and away with it
            former = temporary.with_name(f"{temporary.name}-former")
            os.rename(final, former)
            os.rename(temporary, final)
            shutil.rmtree(former, ignore_errors=True)
        else:
            os.rename(temporary, final)
        sync(final.parent)
    with writing(final.parent / LATEST):
        at("latest")
        pointer = final.parent / f"{LATEST}{UNFINISHED}{temporary.name[-8:]}"
        _write(pointer, final.name + "\n")
        os.replace(pointer, final.parent / LATEST)
        sync(final.parent)


def _write(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn failures of writing into one line that names the path and the system's reason."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: the checkpoint can't be written ({error.strerror}); make room, or use another run.dir"
        ) from None


def frozen_hashes(config: TrainConfig) -> dict[str, str]:
    """SHA-256 of what describes weights that are never trained: `base` of adapters, `reference` of the model beside. Of
    a checkpoint its manifest, which has its files' hashes; of a Hugging Face folder names, sizes and config.json. Of
    those that can't be read, as where they have moved, none."""
    paths = {
        "base": config.model.lora.base if config.model.lora.rank else None,
        "reference": config.task.reference if has_reference(config) else None,
    }
    found = {}
    for kind, path in paths.items():
        if path is not None:
            with suppress(UserError, OSError):
                found[kind] = hashlib.sha256(_description(path)).hexdigest()
    return found


def _description(path: str) -> bytes:
    if not is_hf_folder(path):
        return (find_checkpoint(path) / MANIFEST).read_bytes()
    files = sorted((file.name, file.stat().st_size) for file in Path(path).glob("*.safetensors"))
    return repr(files).encode() + (Path(path) / "config.json").read_bytes()


def data_hashes(prefix: str | None) -> dict[str, str]:
    """SHA-256 of the token file and of the tokenizer, from the manifest beside them; empty where there is none."""
    try:
        files = json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8"))["files"]
        named = {".bin": "tokens", ".tokenizer.json": "tokenizer", ".model": "tokenizer"}
        return {name: files[ending]["sha256"] for ending, name in named.items() if ending in files}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
