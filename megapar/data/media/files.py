"""What a path of media names: shards (tar), or loose files; and the samples in them.

A sample is all files with one key, WebDataset's rule (Aizman, Maltby, Breuel 2019): `KEY.EXT`, where KEY is the path up
to the first dot of the file's name. Files without an ending, hidden ones, links and folders are no part of a sample.
"""

import os
import re
import tarfile
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from weakref import finalize

from megapar.config.errors import ConfigError, UserError
from megapar.data.corpus import TextFile, find_text

IMAGES = frozenset(("png", "jpg", "jpeg", "bmp", "webp", "ppm", "pgm"))
SOUNDS = frozenset(("wav", "flac", "ogg"))
TEXTS = frozenset(("txt", "cls", "json"))
KINDS = IMAGES | SOUNDS | TEXTS

SHARD = ".tar"
GZIP = b"\x1f\x8b"  # how a compressed file begins
MOST_OPEN = 128
BLOCK = 512  # bytes; a tar ends with a block of zeros
_RANGE = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)


@dataclass(frozen=True)
class Member:
    """A file of a sample. ending: EXT in lower case; file: the number of the file on disk that it is in, or is; offset,
    size: where, in bytes; place: what errors call it"""

    ending: str
    file: int
    offset: int
    size: int
    place: str

    @property
    def kind(self) -> str:
        """The last part of its ending."""
        return self.ending.rpartition(".")[2]


@dataclass(frozen=True)
class Group:
    """The files of one sample. file: the number of the first; place: what errors call it; cut: why more may be lost"""

    key: str
    file: int
    place: str
    members: tuple[Member, ...]
    cut: UserError | None = None


@dataclass(frozen=True)
class Found:
    """What a path names. root: of names; files: shards, or the loose files below a folder, in the order of their names;
    ignored: how many files beside shards there are, by ending"""

    root: Path
    files: list[TextFile]
    loose: bool
    ignored: Counter[str]


class OpenFiles:
    """Bytes of files by number, of which the last MOST_OPEN that were read stay open. Threads may share it."""

    def __init__(self, paths: Sequence[str | Path]) -> None:
        self.paths, self._open, self._lock = paths, OrderedDict[int, int](), Lock()
        finalize(self, _close, self._open)

    def read(self, file: int, offset: int, size: int) -> bytes:
        """So many bytes, or fewer where the file ends before. Raises OSError."""
        with self._lock:
            if file not in self._open:
                if len(self._open) == MOST_OPEN:
                    os.close(self._open.popitem(last=False)[1])
                self._open[file] = os.open(self.paths[file], os.O_RDONLY)
            self._open.move_to_end(file)
            return os.pread(self._open[file], size, offset)


def _close(descriptors: OrderedDict[int, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)


def find_media(path: str, key: str) -> Found:
    """Find shards or loose files: of a shard, a folder of either, or a pattern such as `train-{000..009}.tar`.

    Raises ConfigError for `key`.
    """
    place = Path(path).expanduser().absolute()
    if place.is_dir():
        files = find_text(str(place), key).files
        shards = [file for file in files if file.name.lower().endswith(SHARD)]
        others = Counter(_kind(file.name) for file in files if not file.name.lower().endswith(SHARD))
        return Found(place, shards or files, not shards, others if shards else Counter())
    names = [str(place)] if place.exists() else list(expanded(str(place)))
    if missing := [name for name in names if not Path(name).exists()]:
        some = f"{len(missing)} of {len(names)} shards are missing, the first {missing[0]}"
        problem = "no such file" if len(names) == 1 else some
        raise ConfigError(key, path, f"{problem}; name a .tar shard, a pattern of shards, or a folder")
    if wrong := [name for name in names if not name.lower().endswith(SHARD) or Path(name).is_dir()]:
        problem = f"{wrong[0]} is no shard; name .tar files, not compressed, or a folder of files"
        raise ConfigError(key, path, problem)
    return Found(place.parent, [file for name in names for file in find_text(name, key).files], False, Counter())


def expanded(pattern: str) -> Iterator[str]:
    """The names that a pattern with ranges `{000..009}` and choices `{a,b}` stands for, in order, as a shell's."""
    if (found := _RANGE.search(pattern)) is None:
        yield pattern
        return
    if found[3] is not None:
        choices = found[3].split(",")
    else:
        first, last = int(found[1]), int(found[2])
        padded = any(len(end) > 1 and end[0] == "0" for end in (found[1], found[2]))
        width = max(len(found[1]), len(found[2])) if padded else 0
        step = 1 if first <= last else -1
        choices = [f"{number:0{width}}" for number in range(first, last + step, step)]
    for choice in choices:
        yield from expanded(f"{pattern[: found.start()]}{choice}{pattern[found.end() :]}")


def loose_groups(files: list[TextFile], first: int, ignored: Counter[str]) -> list[Group]:
    """The samples of loose files, in the order of their names. first: number of the first file; ignored: counts, by
    ending, what is no part of a sample"""
    members: dict[str, list[Member]] = {}
    for number, file in enumerate(files, first):
        _add(members, file.name, Member("", number, 0, file.stamp[0], str(file.path)), ignored)
    roots = {key: files[found[0].file - first].path.parent for key, found in members.items()}
    return [
        Group(key, found[0].file, str(roots[key] / key.rpartition("/")[2]), tuple(found))
        for key, found in members.items()
    ]


def shard_groups(shard: TextFile, number: int, ignored: Counter[str]) -> list[Group]:
    """The samples of a shard, in its order; of one that is cut short, the last one says so. number: the shard's"""
    members: dict[str, list[Member]] = {}
    names: list[str] = []
    problem = None
    try:
        for name, offset, size in _regular(shard.path):
            if _add(members, name, Member("", number, offset, size, f"{shard.path}:{name}"), ignored):
                names.append(name)
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        problem = UserError(f"{shard.path}: can't be read ({reason}); mend or remove it")
    groups = [Group(key, number, f"{shard.path}:{key}", tuple(found)) for key, found in members.items()]
    if problem is None:
        return groups
    last = _parts(names[-1])[0] if names else ""  # pairs of what was cut off may be lost
    kept = [group for group in groups if group.key != last]
    return [*kept, Group(last, number, str(shard.path), (), problem)]


def _regular(path: Path) -> Iterator[tuple[str, int, int]]:
    """(name, offset of its bytes, size) of the regular files of a tar. Raises tarfile.TarError where it is cut short:
    `tarfile` takes a tar that ends in the middle of a header, or without a block of zeros, for a whole one."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        if file.read(2) == GZIP:
            raise tarfile.ReadError("it is compressed; unpack it with gunzip, as files are read where they lie")
    with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            if member.isreg():
                if member.issparse():
                    raise tarfile.ReadError(f"{member.name} is stored as a sparse file")
                yield member.name, member.offset_data, member.size
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"cut short in {member.name}")
        file.seek(tar.offset)
        if file.read(BLOCK) != bytes(BLOCK):
            raise tarfile.ReadError(f"cut short or damaged at byte {tar.offset}")


def _add(members: dict[str, list[Member]], name: str, member: Member, ignored: Counter[str]) -> bool:
    key, ending = _parts(name)
    if not key:
        ignored[_kind(name)] += 1
        return False
    found = replace(member, ending=ending.lower())
    if found.kind not in KINDS:
        ignored[_kind(name)] += 1
        return False
    members.setdefault(key, []).append(found)
    return True


def _parts(name: str) -> tuple[str, str]:
    """KEY and EXT; both empty where there are none."""
    found = _NAME.fullmatch(name)
    return (found[1], found[2]) if found else ("", "")


def _kind(name: str) -> str:
    base = name.rpartition("/")[2]
    return f".{base.rpartition('.')[2].lower()}" if "." in base.lstrip(".") else "no ending"
