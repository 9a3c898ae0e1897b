"""The manifest of a prepared corpus, `PREFIX.json`: what the token files are, and the hashes that prove it."""

import hashlib
import json
import os
import random
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megapar.config.errors import ConfigError, UserError
from megapar.data.indexed import IndexedTokens
from megapar.data.split import load_hashes
from megapar.data.tokenizer.files import ENDINGS, JSON, MODEL

FORMAT = "megapar-tokens"
VERSION = 1
# Endings of the files of a corpus; the manifest itself ends in .json.
FILES = (".bin", ".idx", ".split.npy", *ENDINGS.values())
BLOCK = 65536  # bytes that the quick check hashes at one place
NUM_BLOCKS = 64  # such places per file
NUM_SECTIONS = 64  # running digests per file: they tell where a change begins
FIELDS: dict[str, type | tuple[type, ...]] = {
    "source": dict,
    "tokenizer": (dict, type(None)),
    "dtype": str,
    "tokens": int,
    "documents": int,
    "vocab_size": (int, type(None)),
    "end_of_text": (int, type(None)),
    "max_token": int,
    "files": dict,
}
RECORD = {"size", "sha256", "section", "running", "blocks"}


def file_record(path: Path) -> dict[str, Any]:
    """What the manifest says about a file.

    size      bytes
    sha256    of the whole file
    section   bytes per section; `running` holds the digest of the file up to the end of each
    blocks    [offset, digest of BLOCK bytes there], at seeded places, the first and last block among them
    """
    size = path.stat().st_size
    count = -(-size // BLOCK)
    section = max(1, -(-count // NUM_SECTIONS)) * BLOCK
    sha256, running = _running_digests(path, section)
    chosen = set(range(count))
    if count > NUM_BLOCKS:
        chosen = {0, count - 1, *random.Random(0).sample(range(1, count - 1), NUM_BLOCKS - 2)}
    with open(path, "rb") as file:
        blocks = [[BLOCK * number, _digest(_block(file, BLOCK * number))] for number in sorted(chosen)]
    return {"size": size, "sha256": sha256, "section": section, "running": running, "blocks": blocks}


def _running_digests(path: Path, section: int) -> tuple[str, list[str]]:
    running: list[str] = []
    total = hashlib.sha256()
    left = section
    with open(path, "rb") as file:
        while chunk := file.read(min(left, 1 << 20)):
            total.update(chunk)
            left -= len(chunk)
            if left == 0:
                running.append(total.copy().hexdigest()[:32])
                left = section
    if left < section:
        running.append(total.hexdigest()[:32])
    return total.hexdigest(), running


def _block(file: Any, offset: int) -> bytes:
    file.seek(offset)
    data: bytes = file.read(BLOCK)
    return data


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def build_manifest(
    prefix: Path,
    *,
    source: dict[str, Any],
    tokenizer: dict[str, Any] | None,
    vocab_size: int | None,
    end_of_text: int | None,
    key: str | None,
) -> dict[str, Any]:
    """Check the token files and describe them, every byte read once or twice.

    Raises UserError where they are faulty or hold ids that are negative or outside the vocabulary.
    """
    corpus = IndexedTokens(prefix)
    limit = None if vocab_size is None else vocab_size - 1
    max_token = -1
    step = 1 << 22
    for begin in range(0, corpus.num_tokens, step):
        max_token = max(max_token, _check_ids(corpus, begin, corpus.tokens[begin : begin + step], limit))
    return {
        "format": FORMAT,
        "version": VERSION,
        "key": key,
        "source": source,
        "tokenizer": tokenizer,
        "dtype": corpus.dtype.name,
        "tokens": corpus.num_tokens,
        "documents": corpus.num_documents,
        "vocab_size": vocab_size,
        "end_of_text": end_of_text,
        "max_token": max_token,
        "files": {end: file_record(Path(f"{prefix}{end}")) for end in FILES if os.path.isfile(f"{prefix}{end}")},
    }


def _check_ids(corpus: IndexedTokens, begin: int, tokens: np.ndarray, limit: int | None) -> int:
    """Largest of `tokens`, which begin at token `begin` of the corpus. Raises UserError for an impossible id."""
    high = int(tokens.max()) if len(tokens) else -1
    if len(tokens) and (tokens.min() < 0 or (limit is not None and high > limit)):
        wrong = (tokens < 0) if limit is None else ((tokens < 0) | (tokens > limit))
        place = begin + int(np.flatnonzero(wrong)[0])
        bound = "ids can't be negative" if limit is None else f"ids must lie in 0..{limit}"
        raise UserError(
            f"{corpus.prefix}.bin: offset {place * corpus.dtype.itemsize}: token id {corpus.tokens[place]}; {bound}"
        )
    return high


def write_manifest(prefix: Path, manifest: dict[str, Any]) -> None:
    """Write `prefix`.json (temporary file, then rename)."""
    path = Path(f"{prefix}.json")
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    temporary.write_text(json.dumps(manifest, indent=1) + "\n")
    os.replace(temporary, path)


def read_manifest(prefix: str | Path) -> dict[str, Any] | None:
    """The manifest at `prefix`; None where there is no such file. Raises UserError where it is not one of ours."""
    path = Path(f"{prefix}.json")
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from None
    try:
        manifest = json.loads(text)
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(
            f"{path}: offset 0: not a manifest of megapar, or a damaged one; move or delete it to have it made anew"
        )
    if manifest.get("version") != VERSION:
        raise UserError(
            f"{path}: manifest version {manifest.get('version')} is unknown; delete it to have it made anew"
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or not {".bin", ".idx"} <= set(files) <= set(FILES):
        raise UserError(f"{path}: field 'files' does not name .bin and .idx; delete the file to have it made anew")
    for field, kind in FIELDS.items():
        if not isinstance(manifest.get(field, ...), kind):
            raise UserError(
                f"{path}: field {field!r} is missing or of the wrong type; delete the file to have it made anew"
            )
    for end, record in files.items():
        if not isinstance(record, dict) or not set(record) >= RECORD:
            raise UserError(f"{path}: the record of {end} is incomplete; delete the file to have it made anew")
    return manifest


def tokenizer_named(prefix: str | Path, manifest: dict[str, Any]) -> Path | None:
    """The tokenizer's file that a manifest names; None where it names none."""
    endings = (ENDINGS[name] for name in (MODEL, JSON))
    return next((Path(f"{prefix}{end}") for end in endings if end in manifest["files"]), None)


def check(prefix: str | Path, mode: Literal["quick", "full"] = "quick") -> dict[str, Any]:
    """Hold the files of a corpus against their manifest, and return it.

    Always: sizes, the index (header, bounds, order), 64 blocks of 64 KiB of each file and the ids in those of `.bin`.
    "full" also hashes every byte. Raises UserError with file and offset where a file is truncated, changed or not of
    this corpus. Without a manifest nothing can be said: also an error.
    """
    if mode not in ("quick", "full"):
        raise ConfigError("data.verify", mode, "must be quick or full")
    manifest = read_manifest(prefix)
    if manifest is None:
        raise UserError(f"{prefix}.json: no such file; `megapar data data.path={prefix}` makes it")
    corpus = IndexedTokens(prefix)
    for field, found in (
        ("tokens", corpus.num_tokens),
        ("documents", corpus.num_documents),
        ("dtype", corpus.dtype.name),
    ):
        if manifest[field] != found:
            raise UserError(
                f"{prefix}.idx: offset 17: {field} {found}, the manifest says {manifest[field]}: of another corpus"
            )
    for end, record in manifest["files"].items():
        _check_blocks(Path(f"{prefix}{end}"), record)
    if ".split.npy" in manifest["files"]:
        load_hashes(str(prefix), corpus.num_documents)
    _check_sampled_ids(corpus, manifest)
    if mode == "full":
        for end, record in manifest["files"].items():
            _check_whole(Path(f"{prefix}{end}"), record)
    return manifest


def _check_blocks(path: Path, record: dict[str, Any]) -> None:
    try:
        size = path.stat().st_size
        if size != record["size"]:
            raise UserError(
                f"{path}: offset {min(size, record['size'])}: {size} bytes, the manifest says {record['size']}: "
                "truncated, changed or of another corpus"
            )
        with open(path, "rb") as file:
            for offset, digest in record["blocks"]:
                if _digest(_block(file, offset)) != digest:
                    raise UserError(
                        f"{path}: offset {offset}: the {BLOCK // 1024} KiB there are not those of the manifest: "
                        "changed, or of another corpus"
                    )
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); restore it or prepare the corpus anew") from None


def _check_whole(path: Path, record: dict[str, Any]) -> None:
    section = record["section"]
    sha256, running = _running_digests(path, section)
    if sha256 == record["sha256"] and running == record["running"]:
        return
    pairs = zip(running, record["running"], strict=False)
    first = next((number for number, (found, expected) in enumerate(pairs) if found != expected), 0)
    end = min((first + 1) * section, record["size"])
    raise UserError(
        f"{path}: offset {first * section}: the first change lies between there and {end}: "
        f"sha256 {sha256}, the manifest says {record['sha256']}"
    )


def _check_sampled_ids(corpus: IndexedTokens, manifest: dict[str, Any]) -> None:
    limit = manifest["max_token"] if manifest["vocab_size"] is None else manifest["vocab_size"] - 1
    for offset, _ in manifest["files"][".bin"]["blocks"]:
        begin, count = offset // corpus.dtype.itemsize, BLOCK // corpus.dtype.itemsize
        _check_ids(corpus, begin, corpus.tokens[begin : begin + count], limit)
