"""Samples of media, read once in the launcher: every file decoded, texts as records, an index of where media lie."""

import hashlib
import re
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from megapar.config.errors import ConfigError, UserError
from megapar.config.schema import DataConfig
from megapar.cores import num_cores
from megapar.data.corpus import counted
from megapar.data.jsonl import Line, decoded, parse_object
from megapar.data.media.decode import NotInstalled, Undecodable, image_size, sound
from megapar.data.media.files import (
    IMAGES,
    SOUNDS,
    Found,
    Group,
    Member,
    OpenFiles,
    find_media,
    loose_groups,
    shard_groups,
)
from megapar.data.media.samples import AUDIO, IMAGE, marked
from megapar.data.records import SAY, Kind, Origin, Part, Record

KEYS = ("text", "target", "label", "group")
INDEX = ".media.npz"
AT_ONCE = 256  # samples that are decoded at a time, by several threads
SAY_S = 5.0


@dataclass(frozen=True)
class Medium:
    """Where an image or a sound lies, and how large it is decoded. extent: (height, width), or (samples, rate); digest:
    8 bytes of a hash of the file, as a number"""

    kind: int
    member: Member
    extent: tuple[int, int]
    digest: int


class Rows:
    """The index of all samples: where errors find each, and its media."""

    def __init__(self) -> None:
        self.counts, self.ends, self.places = array("i"), array("q"), bytearray()
        self.kinds, self.files = array("b"), array("i")
        self.offsets, self.sizes, self.extents, self.digests = array("q"), array("q"), array("q"), array("Q")

    def add(self, place: str, media: Sequence[Medium]) -> None:
        self.places += place.encode("utf-8", "surrogateescape")
        self.ends.append(len(self.places))
        self.counts.append(len(media))
        for one in media:
            self.kinds.append(one.kind)
            self.files.append(one.member.file)
            self.offsets.append(one.member.offset)
            self.sizes.append(one.member.size)
            self.extents.extend(one.extent)
            self.digests.append(one.digest)

    def save(self, prefix: Path) -> None:
        """Write PREFIX.media.npz: of every sample `counts`, and `places`, UTF-8 that ends at `ends`; of every medium
        `kinds`, `files`, `offsets`, `sizes`, `extents` (two of each) and `digests`."""
        arrays: dict[str, Any] = {
            name: np.frombuffer(column, column.typecode) for name, column in vars(self).items() if name != "places"
        }
        with open(f"{prefix}{INDEX}", "wb") as file:
            np.savez(file, places=np.frombuffer(self.places, np.uint8), **arrays)


def parse(line: Line) -> Record:
    """A sample's record: what the model reads, with media where the text has `<image>` and `<audio>`, or else in front
    of it; and what it is to write. Of the line's values, `images` and `sounds` count media, and `content` is equal
    where what the model reads is. Raises UserError where the text has more marks than there are media."""
    try:
        pieces = marked(line.values.get("text", ""), line.values["images"], line.values["sounds"])
    except ValueError as error:
        raise line.wrong(f"{error}; add what is missing, or take the mark out") from None
    parts = [Part(piece) if isinstance(piece, str) else Part("", token=piece) for piece in pieces]
    target = line.values.get("target")
    written = () if target is None else (Part(target, learned=True, closes=True),)
    group = line.values.get("group", line.values["content"])
    return Record(line, (tuple(parts), written), group, line.values.get("label"))


KIND = Kind("media", parse, sequences=2)


def media_origin(config: DataConfig, say: SAY) -> Origin:
    """The samples of `data.path`, and of `data.valid`. Raises ConfigError."""
    named = [("data.path", config.path), ("data.valid", config.valid)]
    found = [(key, find_media(path, key)) for key, path in named if path is not None]
    first = found[0][1]
    name = first.files[0].path.stem if len(first.files) == 1 else first.root.name or "media"
    paths = [file.path for _, place in found for file in place.files]
    identity = [[str(file.path), *file.stamp] for _, place in found for file in place.files]

    def read(prefix: Path, more: dict[str, Any]) -> Iterator[tuple[int, Record]]:
        return Reading(found, config, name, say).records(prefix, more)

    return Origin(name, paths, len(first.files), identity, read)


class Reading:
    """Reads all samples once. What is broken is refused, or left out and counted, as `data.on_error` says."""

    def __init__(self, found: list[tuple[str, Found]], config: DataConfig, name: str, say: SAY) -> None:
        self.found, self.skip, self.name, self.say = found, config.on_error == "skip", name, say
        self.paths = [file.path for _, place in found for file in place.files]
        self.total = sum(file.stamp[0] for _, place in found for file in place.files)
        self.files, self.ignored = OpenFiles(self.paths), Counter[str]()
        self.rows = Rows()
        self.left_out, self.samples, self.done, self.first = 0, 0, 0, ""

    def records(self, prefix: Path, more: dict[str, Any]) -> Iterator[tuple[int, Record]]:
        """(number of its file, record) of every sample that can be used; then the index is beside the prefix, and what
        was left out in `more`. Raises UserError."""
        said, number = time.monotonic(), 0
        with ThreadPoolExecutor(min(8, num_cores())) as threads:
            for key, place in self.found:
                good, broken, whole = 0, None, self._groups(place, number)
                while some := list(islice(whole, AT_ONCE)):
                    for group, result in zip(some, threads.map(self._sample, some), strict=True):
                        self.samples += 1
                        self.done += sum(member.size for member in group.members)
                        if isinstance(result, UserError):
                            self._refuse(result)
                            broken = broken or result
                            continue
                        record, media = result
                        good += 1
                        self.rows.add(group.place, media)
                        yield group.file, record
                    if time.monotonic() - said > SAY_S and self.total:
                        self.say(f"data: {self.name}: {self.done / self.total:.0%} of {self.total / 1e6:,.0f} MB read")
                        said = time.monotonic()
                number += len(place.files)
                if not good:
                    raise self._nothing(broken, key, place)
        self.rows.save(prefix)
        more["left_out"] = {"count": self.left_out, "samples": self.samples, "first": self.first}
        if self.ignored:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.ignored.most_common(5))
            dots = ", ..." if len(self.ignored) > 5 else ""
            self.say(f"data: {self.name}: {counted(self.ignored.total(), 'file')} not used: {kinds}{dots}")

    def _groups(self, place: Found, number: int) -> Iterator[Group]:
        self.ignored += place.ignored
        if place.loose:
            yield from loose_groups(place.files, number, self.ignored)
            return
        for at, file in enumerate(place.files, number):
            yield from shard_groups(file, at, self.ignored)

    def _sample(self, group: Group) -> tuple[Record, tuple[Medium, ...]] | UserError:
        try:
            if group.cut is not None:
                raise group.cut
            return self._read(group)
        except NotInstalled:
            raise
        except UserError as error:
            return error

    def _read(self, group: Group) -> tuple[Record, tuple[Medium, ...]]:
        values: dict[str, Any] = {}
        given: dict[str, str] = {}  # what says a value

        def give(key: str, value: str, member: Member) -> None:
            if key in values:
                raise UserError(f"{member.place}: a second {key} beside {given[key]}; keep one of them")
            values[key], given[key] = value, member.place.rpartition("/")[2]

        images, sounds = [], []
        endings = Counter(member.ending for member in group.members)
        for member in sorted(group.members, key=_natural):
            if endings[member.ending] > 1:
                raise UserError(f"{member.place}: there are {endings[member.ending]} of that name; keep one of them")
            data = self._bytes(member)
            if member.kind in IMAGES:
                images.append(_medium(IMAGE, member, data))
            elif member.kind in SOUNDS:
                sounds.append(_medium(AUDIO, member, data))
            elif member.kind == "json":
                for key, value in _json(member, data, self.paths[member.file]).items():
                    give(key, value, member)
            else:
                text = _text(member, data)
                kind = "target" if f".{member.ending}".endswith(".target.txt") else "text"
                give("label" if member.kind == "cls" else kind, text.strip() if member.kind == "cls" else text, member)
        media = (*images, *sounds)
        if not media and "text" not in values and "target" not in values:
            raise UserError(f"{group.place}: has no image, sound or text; add one, or remove it")
        read = values.get("text", "") if media or "text" in values else values["target"]
        content = f"{[one.digest for one in media]} {read}"
        values |= {"images": len(images), "sounds": len(sounds), "content": content}
        return parse(Line(self.paths[group.file], 0, values, group.place)), media

    def _bytes(self, member: Member) -> bytes:
        try:
            data = self.files.read(member.file, member.offset, member.size)
        except OSError as error:
            raise _unreadable(member, str(error.strerror)) from None
        if len(data) != member.size:
            raise _unreadable(member, "changed meanwhile")
        return data

    def _refuse(self, error: UserError) -> None:
        if not self.skip:
            raise UserError(f"{error}, or use data.on_error=skip")
        self.left_out += 1
        self.first = self.first or str(error)

    def _nothing(self, broken: UserError | None, key: str, place: Found) -> UserError:
        if broken is not None:
            return UserError(f"{broken}, as no other sample of {key} can be used")
        there = ", ".join(kind for kind, _ in self.ignored.most_common(5))
        problem = f"no file of a sample in it{f', but {there}' if there else ''}; docs/media.md has the endings"
        return ConfigError(key, place.root if len(place.files) > 1 else place.files[0].path, problem)


def digest_of(data: bytes) -> int:
    """By which the bytes of a file are known again."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _medium(kind: int, member: Member, data: bytes) -> Medium:
    try:
        if kind == IMAGE:
            return Medium(kind, member, image_size(data), digest_of(data))
        samples, rate = sound(data)
        return Medium(kind, member, (len(samples), rate), digest_of(data))
    except Undecodable as error:
        raise _unreadable(member, str(error)) from None


def _text(member: Member, data: bytes) -> str:
    try:
        text = decoded(member.place, 1, data)
    except UserError as error:
        raise _unreadable(member, _problem(error)) from None
    if not text.strip():
        raise _unreadable(member, "no text in it")
    return text


def _json(member: Member, data: bytes, path: Path) -> dict[str, str]:
    text = _text(member, data)
    try:
        line = Line(path, 0, parse_object(member.place, text), member.place)
        return {key: line.text(key) for key in KEYS if key in line.values}
    except UserError as error:
        raise _unreadable(member, _problem(error)) from None


def _problem(error: UserError) -> str:
    """What is wrong, without where and what to do."""
    return str(error).rpartition(";")[0].partition(": ")[2]


def _unreadable(member: Member, why: str) -> UserError:
    return UserError(f"{member.place}: can't be read ({why}); mend or remove it")


def _natural(member: Member) -> tuple[list[str | int], str]:
    """Orders names by the values of the numbers in them."""
    pieces = re.split(r"(\d+)", member.ending)
    return [int(piece) if number % 2 else piece for number, piece in enumerate(pieces)], member.ending
