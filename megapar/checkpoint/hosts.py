"""Copies of a run's state in the memory of several hosts: each has the files of its own ranks and of those of the host
before it, so whichever is lost, the others have all.

In a host's folder of copies a checkpoint is as on disk, less the files that are elsewhere. To load it, a host gets what
its ranks need and it does not have from one that has it. Files travel between hosts' memories: no device takes part.
"""

import hashlib
import json
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from megapar.checkpoint.format import (
    MANIFEST,
    RESAVE,
    Manifest,
    StoredFile,
    read_manifest,
    read_plain_file,
    verify_files,
)
from megapar.config.errors import UserError
from megapar.mesh import Mesh
from megapar.parallel.agreement import all_or_none, broadcast_text, gather_texts
from megapar.parallel.boxes import owned_boxes
from megapar.parallel.buffers import StageBuffers

HERE = "\0"  # in front of a path in that folder, which has another name on every host
CHUNK = 1 << 24  # bytes of a file that travel at a time


_copies: Path | None = None


def set_copies_folder(folder: str | None) -> None:
    """Say where this host's launcher keeps copies; None: nowhere."""
    global _copies
    _copies = None if folder is None else Path(folder)


def copies_folder() -> Path | None:
    """This host's folder of copies, if its launcher keeps any."""
    return _copies


def told(path: Path) -> str:
    """A path as other ranks are told of it."""
    own = copies_folder()
    return f"{HERE}{path.relative_to(own)}" if own is not None and path.is_relative_to(own) else str(path)


def understood(text: str) -> tuple[Path, bool]:
    """The path that was told, and whether it is one of copies. Raises UserError on a rank that has no such folder."""
    if not text.startswith(HERE):
        return Path(text), False
    if (own := copies_folder()) is None:
        raise UserError(
            f"checkpoint.replicate: {socket.gethostname()} has no folder for copies, which rank 0's host has"
        )
    return own / text.removeprefix(HERE), True


@dataclass(frozen=True)
class Transfer:
    """A file that goes from one rank's host to another's."""

    name: str
    facts: StoredFile
    source: int
    target: int


class Hosts:
    """Which ranks share a folder of copies, `folder` on this rank's host. Made by all ranks together.

    number: of each rank's host, in the order of their first ranks
    """

    def __init__(self, folder: Path, mesh: Mesh) -> None:
        self.mesh = mesh
        facts = folder.stat()
        mine = f"{socket.gethostname()} {folder} {facts.st_dev} {facts.st_ino}"
        names = gather_texts(mine, mesh["world"], mesh.device)
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        self.number = [numbers[name] for name in names]
        self.count = len(numbers)
        self.mine = self.number[mesh.rank]
        self.here = self.ranks(self.mine)
        self.leads = mesh.rank == self.here[0]

    def ranks(self, host: int) -> list[int]:
        return [rank for rank, number in enumerate(self.number) if number == host]

    def neighbour(self, rank: int) -> int:
        """The rank on the next host that takes this one's file."""
        there = self.ranks((self.number[rank] + 1) % self.count)
        return there[self.ranks(self.number[rank]).index(rank) % len(there)]

    def keeps(self, rank: int) -> bool:
        """Whether this rank's host has that one's file."""
        return self.mine in (self.number[rank], (self.number[rank] + 1) % self.count)

    def to_neighbours(self, files: Mapping[int, tuple[str, StoredFile]], folder: Path) -> None:
        """Give every rank's file to the next host, into the same folder of copies. Collective, raises as `move`."""
        if self.count > 1:
            transfers = [Transfer(*file, rank, self.neighbour(rank)) for rank, file in files.items()]
            self.move(transfers, folder)

    def complete(self, folder: Path, buffers: StageBuffers) -> Manifest:
        """Have on every host what its ranks read of a checkpoint in copies: rank 0's manifest, and the files, each as
        it was written. Collective. Raises the same UserError on all ranks where no host has one of them."""
        world, device, rank = self.mesh["world"], self.mesh.device, self.mesh.rank
        text = ""
        with all_or_none(world, device):
            text = read_plain_file(folder / MANIFEST).decode() if rank == 0 else ""
        text = broadcast_text(text, world, device) or ""
        with all_or_none(world, device):
            if self.leads and rank != 0:
                write_manifest(folder, text)
        with all_or_none(world, device):
            manifest = read_manifest(folder)
        good = good_files(folder, manifest, list(manifest.files)[self.here.index(rank) :: len(self.here)])
        said = gather_texts(json.dumps([good, sorted(files_read(manifest, buffers))]), world, device)
        have, need = zip(*map(json.loads, said), strict=True)
        first = {name: one for one in reversed(range(len(said))) for name in have[one]}
        transfers = []
        for ranks in map(self.ranks, range(self.count)):
            lacks = {name for one in ranks for name in need[one]} - {name for one in ranks for name in have[one]}
            if nowhere := sorted(lacks - first.keys()):
                raise UserError(f"{folder / nowhere[0]}: on no host as it was written; {RESAVE}")
            for place, name in enumerate(sorted(lacks)):
                transfers.append(Transfer(name, manifest.files[name], first[name], ranks[place % len(ranks)]))
        self.move(transfers, folder)
        return manifest

    def move(self, transfers: Sequence[Transfer], folder: Path) -> None:
        """Bring files of every rank's `folder` to other ranks'. Collective, of the same transfers on all ranks. Raises
        the same UserError on all ranks where a file can't be read or written, or does not arrive as it was."""
        ours = [one for one in transfers if self.mesh.rank in (one.source, one.target)]
        with all_or_none(self.mesh["world"], self.mesh.device), ExitStack() as stack:
            moving = [stack.enter_context(_Moving(one, folder, one.source == self.mesh.rank)) for one in ours]
            for start in range(0, max((one.facts.size for one in ours), default=0), CHUNK):
                parts = [(one, one.begin(start)) for one in moving if start < one.file.facts.size]
                works = [
                    dist.isend(part, one.file.target, group=self.mesh.hosts)
                    if one.sends
                    else dist.irecv(part, one.file.source, group=self.mesh.hosts)
                    for one, part in parts
                ]
                for work, (one, part) in zip(works, parts, strict=True):
                    assert work is not None
                    work.wait()
                    one.end(part)
            for one in moving:
                one.check()


class _Moving:
    """A file on its way. What goes wrong is kept for `check`: the other rank goes on with its part of it."""

    def __init__(self, file: Transfer, folder: Path, sends: bool) -> None:
        self.file, self.path, self.sends = file, folder / file.name, sends
        self._buffer = torch.empty(min(CHUNK, file.facts.size), dtype=torch.uint8)
        self._hash = hashlib.sha256()
        self._problem = ""
        self._handle: FileIO | None = None

    def __enter__(self) -> Self:
        with self._trying():
            self._handle = FileIO(self.path, "r" if self.sends else "w")
        return self

    def __exit__(self, *error: object) -> None:
        if self._handle is not None:
            self._handle.close()

    def begin(self, start: int) -> Tensor:
        """The part from here on: to send, or for what is received."""
        part = self._buffer[: self.file.facts.size - start]
        with self._trying():
            if self._handle is not None and self.sends:
                bytes_left = memoryview(part.numpy().data)
                while bytes_left and (count := self._handle.readinto(bytes_left)):
                    bytes_left = bytes_left[count:]
        return part

    def end(self, part: Tensor) -> None:
        with self._trying():
            bytes_left = memoryview(part.numpy().data)
            self._hash.update(bytes_left)
            while self._handle is not None and not self.sends and bytes_left:
                bytes_left = bytes_left[self._handle.write(bytes_left) or 0 :]

    def check(self) -> None:
        """Raises UserError."""
        if not self._problem and self._hash.hexdigest() != self.file.facts.sha256:
            self._problem = "changed, its SHA-256 is not the one in the manifest"
        if self._problem:
            way = f"from rank {self.file.source}'s host to that of rank {self.file.target}"
            raise UserError(f"{self.path}: {self._problem}, on its way {way}")

    @contextmanager
    def _trying(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._problem = self._problem or str(error.strerror)
            if self._handle is not None:
                self._handle.close()
                self._handle = None


def files_read(manifest: Manifest, buffers: StageBuffers) -> set[str]:
    """The files of a checkpoint in which something is of what this rank owns; and all with error feedback."""
    found = {part.file for table in manifest.carried.values() for one in table.values() for part in one.boxes}
    for owned in owned_boxes(buffers):
        stored = manifest.parameters.get(owned.record.name)
        if stored is not None and stored.shape == owned.record.shape:
            found |= {part.file for part in stored.boxes if part.box.overlap(owned.box) is not None}
    return found


def write_manifest(folder: Path, text: str) -> None:
    """Into a folder of copies. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder / MANIFEST}: can't be written ({error.strerror})") from None


def good_files(folder: Path, manifest: Manifest, names: Sequence[str]) -> list[str]:
    """Those of the files that are here as they were written."""
    return [name for name in names if _is_good(folder, manifest, name)]


def _is_good(folder: Path, manifest: Manifest, name: str) -> bool:
    try:
        verify_files(folder, manifest, [name])
        return True
    except UserError:
        return False
