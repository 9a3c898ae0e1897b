"""Records of files as tokens: parsed, tokenised once in the launcher, and read by every rank.

A kind of record says what a line of JSON becomes (`Kind.parse`): sequences of parts, each learned or only read. Lines
come from an `Origin`: JSONL files, or whatever else is read so (`data/media/`). On disk, at a
PREFIX in the cache: `.bin` (tokens, int32), `.npz` (where sequences end, which tokens are learned, lines, labels),
`.json` (a manifest with hashes), the tokenizer's files, and of some kinds `.jsonl` (the lines' objects).
"""

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from megapar.config.errors import ConfigError, UserError
from megapar.config.schema import DataConfig, TrainConfig
from megapar.data.corpus import STDLIB, counted
from megapar.data.jsonl import Line, read_lines
from megapar.data.prepare import cache_folder, new_folder
from megapar.data.source import Prepared, Split
from megapar.data.split import held_out, text_hash
from megapar.data.tokenise import tokenizer_settings
from megapar.data.tokenizer import Tokenizer, open_tokenizer
from megapar.data.tokenizer.contract import Message, RefusedConversation
from megapar.data.tokenizer.files import copy_beside, tokenizer_beside
from megapar.data.tokenizer.train import MADE, make_tokenizer
from megapar.files import write_atomic

CODE_VERSION = 2  # raise it when the same lines would give other files
LABELS = "labels.json"  # in a run directory
OBJECTS = ".jsonl"  # behind a PREFIX
SAY = Callable[[str], Any]


@dataclass(frozen=True)
class Part:
    """A text inside a sequence. learned: the loss counts its tokens; closes: an end-of-text token stands after it,
    learned as the text is; token: below 0, it stands there in place of a text, for what is no text."""

    text: str
    learned: bool = False
    closes: bool = False
    token: int | None = None


@dataclass(frozen=True)
class Record:
    """What a line becomes. sequences: of parts; group: records of one group are held out together; label: its class;
    messages: of a conversation, which the tokenizer writes, its parts being those texts."""

    line: Line
    sequences: tuple[tuple[Part, ...], ...]
    group: str
    label: str | None = None
    messages: tuple[Message, ...] = ()


@dataclass(frozen=True)
class Kind:
    """A kind of record by name, and how many sequences each has. between: tokens of a classifier stand around them;
    keeps: the objects of the lines stay beside the tokens (`Records.values`)."""

    name: str
    parse: Callable[[Line], Record]
    sequences: int = 1
    between: bool = False
    keeps: bool = False


@dataclass(frozen=True)
class Origin:
    """Where records come from, and how they are read.

    name: in what is said, and without its ending of the folder in the cache
    paths: that errors name: the first `training` of them are of `data.path`, the others of `data.valid`
    identity: other JSON as soon as a file is another one
    read: every record, with the number of its path. It gets a PREFIX, beside which it may write files of its own, and
        a dict for what else the manifest is to hold
    """

    name: str
    paths: list[Path]
    training: int
    identity: Any
    read: Callable[[Path, dict[str, Any]], Iterable[tuple[int, Record]]]


class Records:
    """The records of a split, in the order of their lines.

    labels: names of the classes, in the order of their numbers; empty without classes
    lengths: tokens of every sequence, int64 [records, sequences]
    classes: class of every record, int64 [records]; -1 without
    """

    def __init__(self, prefix: str, split: Split) -> None:
        manifest = read_manifest(prefix)
        arrays = np.load(f"{prefix}.npz", allow_pickle=False)
        tokens = np.memmap(f"{prefix}.bin", np.int32, "r")
        self.labels: list[str] = manifest["labels"]
        self._files: list[str] = manifest["paths"]
        self._tokens, self._learned, self._offsets = tokens, arrays["learned"], arrays["offsets"]
        self._chosen = np.flatnonzero(arrays["held"] == (split == "valid"))
        self._lines, self._sources, self._sequences = arrays["lines"], arrays["sources"], manifest["sequences"]
        self.lengths = np.diff(self._offsets).reshape(-1, self._sequences)[self._chosen]
        self.classes: np.ndarray = arrays["classes"][self._chosen]
        self._objects = Path(f"{prefix}{OBJECTS}")
        if self._objects.exists():
            ends = np.flatnonzero(np.memmap(self._objects, np.uint8, "r") == ord("\n")) + 1
            self._ends = np.concatenate([[0], ends])

    def __len__(self) -> int:
        return len(self._chosen)

    def sequence(self, record: int, number: int = 0, most: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int64 [n] of a sequence, and which of them are learned, bool [n]. most: the first of them alone."""
        at = self._chosen[record] * self._sequences + number
        start, stop = self._offsets[at], self._offsets[at + 1]
        place = slice(start, stop if most is None else min(stop, start + most))
        return self._tokens[place].astype(np.int64), self._learned[place]

    def where(self, record: int) -> str:
        """FILE:LINE of a record."""
        at = self._chosen[record]
        return f"{self._files[self._sources[at]]}:{self._lines[at]}"

    def values(self, record: int) -> dict[str, Any]:
        """The object of a record's line, of a kind that keeps it."""
        at = self._chosen[record]
        with open(self._objects, "rb") as file:
            file.seek(int(self._ends[at]))
            found: dict[str, Any] = json.loads(file.readline())
        return found


def keep_labels(config: TrainConfig) -> None:
    """Write the names of the classes into the run directory, in the order of their numbers, so that what the model says
    can be told without the data. Nothing for data without classes. Call it on one rank."""
    if config.model.output == "classes" and config.run.dir is not None and (names := _labels_beside(config)):
        write_atomic(Path(config.run.dir) / LABELS, json.dumps(names, ensure_ascii=False) + "\n")


def run_labels(run_dir: Path, config: TrainConfig) -> list[str]:
    """The names of a run's classes: in its directory, or beside its records. Raises UserError."""
    path = run_dir / LABELS
    try:
        names = json.loads(path.read_text(encoding="utf-8")) if path.exists() else _labels_beside(config)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read ({error}); write a list of the classes' names there, as JSON") from None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: not there, or no list of names; write those of the classes there, by their numbers")
    return names


def _labels_beside(config: TrainConfig) -> list[str]:
    if config.data.prefix is None or not Path(f"{config.data.prefix}.json").exists():
        return []
    names: list[str] = read_manifest(config.data.prefix).get("labels", [])
    return names


def prepare_records(kind: Kind, config: DataConfig, say: SAY) -> Prepared:
    """Find or make the tokenised records of `data.path`, and of `data.valid` if there is one, which is then held out.

    Raises ConfigError or UserError, one line with file and line number, for what can't be used.
    """
    if config.path == STDLIB:
        raise ConfigError(
            "data.path", config.path, "is not a file of records; name a .jsonl file, with an object in every line"
        )
    paths = [Path(path).expanduser().absolute() for path in (config.path, config.valid) if path is not None]
    for key, path in zip(("data.path", "data.valid"), paths, strict=False):
        if not path.is_file():
            next(read_lines(path, key))

    def read(prefix: Path, more: dict[str, Any]) -> Iterator[tuple[int, Record]]:
        for source, (key, path) in enumerate(zip(("data.path", "data.valid"), paths, strict=False)):
            for line in read_lines(path, key):
                yield source, kind.parse(line)

    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    return prepare_from(Origin(paths[0].name, paths, 1, hashes, read), kind, config, say)


def prepare_from(origin: Origin, kind: Kind, config: DataConfig, say: SAY) -> Prepared:
    """Find or make the tokenised records of an origin. Raises ConfigError or UserError."""
    settings = {
        "code": CODE_VERSION,
        "kind": kind.name,
        "tokenizer": tokenizer_settings(config),
        "split": config.split,
        "files": origin.identity,
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    folder = cache_folder(config) / f"{Path(origin.name).stem[:40]}-{kind.name}-{key[:16]}"
    if _whole(folder / "records") is None:
        with new_folder(folder.parent, Path(origin.name).stem) as temporary:
            _make(temporary / "records", origin, kind, config, say)
            if folder.exists():  # broken
                os.rename(folder, temporary / "broken")
            try:
                os.rename(temporary, folder)
            except OSError:  # another launcher was faster
                if _whole(folder / "records") is None:
                    raise
    prefix = str(folder / "records")
    manifest = read_manifest(prefix)
    paths = [str(path) for path in origin.paths]
    if manifest["paths"] != paths:  # the same content elsewhere: errors name today's files
        _write_manifest(prefix, manifest | {"paths": paths})
    tokenizer = tokenizer_beside(prefix)
    classes = len(manifest["labels"]) or None
    return Prepared(prefix, manifest["vocab_size"], manifest["max_token"], tokenizer, classes, kind.name)


def _whole(prefix: Path) -> dict[str, Any] | None:
    """The manifest of records whose files are there, in their sizes."""
    try:
        manifest = read_manifest(prefix)
        files = manifest["files"].items()
        return manifest if all(os.path.getsize(f"{prefix}{end}") == facts["size"] for end, facts in files) else None
    except (UserError, OSError):
        return None


def read_manifest(prefix: str | Path) -> dict[str, Any]:
    """What PREFIX.json says of records. Raises UserError where it can't be read."""
    path = Path(f"{prefix}.json")
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read ({error}); remove its folder, and it is made anew") from None


def _make(prefix: Path, origin: Origin, kind: Kind, config: DataConfig, say: SAY) -> None:
    records: list[Record] = []
    sources: list[int] = []
    more: dict[str, Any] = {}
    for source, record in origin.read(prefix, more):
        sources.append(source)
        records.append(record)
    held = _held_out(records, np.array(sources) >= origin.training, config)
    labels = _labels(records, held, kind)
    tokenizer = _tokenizer(prefix, config, [one for one, out in zip(records, held, strict=True) if not out], say)
    tokens, learned, offsets = array("i"), bytearray(), [0]
    for sequence, ids, mask in _encoded(kind, records, tokenizer):
        assert sequence == len(offsets) - 1
        tokens.extend(ids)
        learned.extend(mask)
        offsets.append(len(tokens))
    np.array(tokens, dtype=np.int32).tofile(f"{prefix}.bin")
    numbers = {label: number for number, label in enumerate(labels)}
    np.savez(
        f"{prefix}.npz",
        learned=np.frombuffer(learned, dtype=bool),
        offsets=np.array(offsets, dtype=np.int64),
        held=held,
        sources=np.array(sources, dtype=np.int8 if len(origin.paths) < 128 else np.int32),
        lines=np.array([record.line.number for record in records], dtype=np.int64),
        classes=np.array([numbers.get(str(record.label), -1) for record in records], dtype=np.int64),
    )
    if kind.keeps:
        lines = (f"{json.dumps(record.line.values)}\n" for record in records)
        Path(f"{prefix}{OBJECTS}").write_text("".join(lines), encoding="utf-8")
    endings = [path.name.removeprefix(prefix.name) for path in prefix.parent.iterdir()]
    _write_manifest(
        str(prefix),
        {
            "format": "megapar-records",
            "kind": kind.name,
            "sequences": kind.sequences,
            "labels": labels,
            "paths": [str(path) for path in origin.paths],
            "vocab_size": 1 if tokenizer is None else tokenizer.vocab_size,
            "max_token": max(0, max(tokens, default=0)),
            "files": {end: _facts(Path(f"{prefix}{end}")) for end in sorted(endings)},
        }
        | more,
    )
    count = f"{counted(len(records), 'record')} ({int(held.sum()):,} held out), {counted(len(tokens), 'token')}"
    say(f"data: {origin.name}: {count}" + (f", {counted(len(labels), 'class')}" if labels else ""))


def _facts(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _write_manifest(prefix: str, manifest: dict[str, Any]) -> None:
    temporary = f"{prefix}.json.tmp-{os.getpid()}"
    Path(temporary).write_text(json.dumps(manifest) + "\n", encoding="utf-8")
    os.replace(temporary, f"{prefix}.json")


def _held_out(records: Sequence[Record], valid: np.ndarray, config: DataConfig) -> np.ndarray:
    """Which are for validation, bool [records]: those of `data.valid`, or by the hash of their group."""
    if config.valid is not None:
        return valid
    return held_out(np.array([text_hash(record.group) for record in records], dtype=np.uint64), config.split)


def _labels(records: Sequence[Record], held: np.ndarray, kind: Kind) -> list[str]:
    """Names of the classes, sorted. Of a classifier's records raises UserError for one that only held-out records have,
    and where there is one alone."""
    known = {record.label for record, out in zip(records, held, strict=True) if not out and record.label is not None}
    if not kind.between:  # whatever they are for
        return sorted(known)
    for record in records:
        if record.label is not None and record.label not in known:
            some = ", ".join(sorted(known)[:5])
            problem = f'the label "{record.label}" does not occur in training, which has {some}'
            raise record.line.wrong(
                problem + ("..." if len(known) > 5 else "") + "; correct it, or add records with it to training"
            )
    if len(known) == 1:
        problem = f'every record has the label "{known.pop()}"; a classifier needs two labels or more'
        raise ConfigError("data.path", records[0].line.path, problem)
    return sorted(known)


def _tokenizer(prefix: Path, config: DataConfig, records: Sequence[Record], say: SAY) -> Tokenizer | None:
    """The one that is named, or trained on the records, beside the prefix; None for records without a text."""
    if config.tokenizer not in MADE:
        copy_beside(open_tokenizer(config.tokenizer).path, prefix)
    else:
        parts = (part for record in records for sequence in record.sequences for part in sequence)
        texts = (part.text for part in parts if part.token is None)
        if (first := next(texts, None)) is None:
            return None
        path = Path(f"{prefix}.model")
        say(f"data: {make_tokenizer(config.tokenizer, chain([first], texts), config.vocab_size, path)}")
    found = tokenizer_beside(prefix)
    assert found is not None
    return open_tokenizer(found)


def _encoded(
    kind: Kind, records: Sequence[Record], tokenizer: Tokenizer | None
) -> Iterator[tuple[int, list[int], list[bool]]]:
    """Every sequence: its number, its tokens, and which of them are learned."""
    sequences = [(record, sequence) for record in records for sequence in record.sequences]
    plain = [part for record, sequence in sequences if not record.messages for part in sequence if part.token is None]
    if tokenizer is None:
        if plain:
            problem = "there is no text in training to make a tokenizer of, but some is held out; name a tokenizer"
            raise ConfigError("data.tokenizer", "bpe", problem)
        for number, (_, sequence) in enumerate(sequences):
            yield number, [part.token for part in sequence if part.token is not None], [False] * len(sequence)
        return
    end = tokenizer.end_of_text
    before, behind = tokenizer.classified if kind.between else ([], [])
    talks = [record for record in records if record.messages]
    try:
        written = iter(tokenizer.conversations([record.messages for record in talks]))
    except RefusedConversation as error:
        raise talks[error.number].line.wrong(error.problem) from None
    texts = iter(tokenizer.encode_batch([part.text for part in plain]))
    for number, (record, sequence) in enumerate(sequences):
        if record.messages:
            pieces = next(written)
            yield number, [token for ids, _ in pieces for token in ids], [own for ids, own in pieces for _ in ids]
            continue
        ids, learned = list(before), [False] * len(before)
        for part in sequence:
            new = [part.token] if part.token is not None else next(texts) + ([end] if part.closes else [])
            ids += new
            learned += [part.learned] * len(new)
        yield number, ids + behind, learned + [False] * len(behind)


def refuse_too_few(records: Records, split: Split, config: DataConfig) -> None:
    """Raise ConfigError where a split has no record."""
    if len(records):
        return
    if split == "train":
        raise ConfigError("data.path", config.path, "all records are held out; lower data.split")
    problem = "no record is held out; raise it, name a file in data.valid, or set train.eval_every=0"
    raise ConfigError("data.split", config.split, problem)


def fitting(
    records: Records,
    too_long: np.ndarray,
    config: DataConfig,
    most: int | str,
    keys: str = "train.seq_length",
    lengths: np.ndarray | None = None,
) -> np.ndarray:
    """Numbers of the records to use, int64 [n]. too_long: those of more tokens than fit, bool [records]; most: how many
    do; keys: what says so; lengths: tokens of each, [records], if not those of its sequences.

    Raises UserError for the first of them, unless `data.too_long` says what to do, and where none is left.
    """
    if not too_long.any() or config.too_long == "truncate":
        return np.arange(len(records))
    first = int(np.flatnonzero(too_long)[0])
    length = int(records.lengths[first].sum() if lengths is None else lengths[first])
    problem = f"{records.where(first)}: {length} tokens, of which at most {most} fit"
    if config.too_long == "refuse":
        raise UserError(f"{problem}; raise {keys}, or use data.too_long=skip")
    if too_long.all():
        raise UserError(f"{problem}, and no other record is shorter than that; raise {keys}")
    return np.flatnonzero(~too_long)


def teaching(records: Records, chosen: np.ndarray, learned: np.ndarray) -> np.ndarray:
    """Those of the chosen records that still teach something when they are cut, int64 [n]. learned: tokens that the
    loss counts, [chosen]

    Raises UserError where there is none.
    """
    if not learned.any():
        problem = "no response is left of any record; raise train.seq_length, or shorten the prompts"
        raise UserError(f"{records.where(int(chosen[0]))}: {problem}")
    return chosen[learned > 0]
