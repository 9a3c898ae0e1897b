"""Text to token files, once: in the launcher, before any worker starts."""

import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megapar.config.errors import ConfigError, UserError
from megapar.config.schema import DataConfig
from megapar.data.corpus import STDLIB, TextSource, find_text, skipped_text
from megapar.data.indexed import IndexedTokens, has_token_files
from megapar.data.manifest import FILES, build_manifest, check, read_manifest, tokenizer_named, write_manifest
from megapar.data.split import check_holdout, token_hashes
from megapar.data.tokenise import Log, make_token_files, token_file_settings
from megapar.data.tokenizer import open_tokenizer
from megapar.data.tokenizer.files import ENDINGS, tokenizer_beside

__all__ = ["Prepared", "check", "open_prepared", "prepare"]

DESCRIBED = "megatron"  # the kind of token files that came without a manifest
CODE_VERSION = 2  # of how these are described: raise it when a description would differ

LOCK = ".lock"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room on the disk, in a quota, or for so large a file


@dataclass(frozen=True)
class Prepared:
    """A corpus ready to train on: files `prefix`.bin, .idx, .json (the manifest) and, where known, the tokenizer's.

    vocab_size      entries of the tokenizer; None for token files that came without one
    max_token       largest id in the corpus; `model.vocab_size` must be above it
    tokenizer_path  the tokenizer's file, PREFIX.model or PREFIX.tokenizer.json; None where there is none
    """

    prefix: str
    vocab_size: int | None
    max_token: int
    tokens: int
    documents: int
    tokenizer_path: Path | None
    manifest: dict[str, Any]


def prepare(config: DataConfig, *, prefix: str | None = None, log: Log | None = None) -> Prepared:
    """Find or make the token files of `config`.

    `data.prefix`, or a `data.path` that is a PREFIX of existing token files, is opened as it is; a manifest is made
    on first use (beside the files, or in the cache where their folder is read-only). Text is tokenised into the
    cache, or to `prefix` where given, and found there again as long as text and settings are the same. Several
    launchers may prepare the same corpus at once.

    Raises ConfigError naming the key, or UserError naming file and offset. Callers `check` the result.
    """
    say: Log = log or (lambda line: None)
    check_holdout(config.split)
    if prefix is None and config.prefix is not None:
        if not has_token_files(config.prefix):
            raise ConfigError(
                "data.prefix", config.prefix, "no token files there: PREFIX.bin and PREFIX.idx must exist"
            )
        return _open_token_files(config.prefix, config, say)
    if config.path != STDLIB and has_token_files(config.path):
        text = os.path.exists(os.path.expanduser(config.path))
        if prefix is not None and not text:
            raise ConfigError(
                "out", prefix, f"data.path={config.path} is token files already; there is nothing to write"
            )
        if prefix is None and text:
            raise _two_meanings(config.path)
        if prefix is None:
            return _open_token_files(config.path, config, say)
    if config.path == STDLIB and os.path.exists(STDLIB):
        say(f"data: {STDLIB} is Python's standard library; write data.path=./{STDLIB} for what lies here by that name")

    if config.path.endswith((".bin", ".idx")) and has_token_files(config.path[:-4]):
        raise ConfigError("data.path", config.path, f"give the PREFIX without its ending: data.path={config.path[:-4]}")
    source = find_text(config.path)
    settings = token_file_settings(config, source)
    key = _hash([settings, source.listing()])
    if prefix is not None:
        return _prepare_at(Path(prefix).expanduser().absolute(), source, config, settings, key, say)
    folder = cache_folder(config) / f"{source.name[:40]}-{key[:16]}"
    if ready := _reusable(folder / "tokens", key, say):
        return ready
    with _work_folder(folder.parent, source.name, key) as temporary:
        if ready := _reusable(folder / "tokens", key, say):  # of another launcher, meanwhile
            return ready
        make_token_files(temporary / "tokens", source, config, settings, key, say)
        _publish(temporary, folder, key)
    (folder / LOCK).unlink(missing_ok=True)
    return open_prepared(folder / "tokens")


def open_prepared(prefix: str | Path) -> Prepared:
    """What the manifest at `prefix` says. Raises UserError where there is none."""
    prefix = os.path.abspath(prefix)
    manifest = read_manifest(prefix)
    if manifest is None:
        raise UserError(f"{prefix}.json: no such file; `megapar data data.path={prefix}` makes it")
    return Prepared(
        prefix=prefix,
        vocab_size=manifest["vocab_size"],
        max_token=manifest["max_token"],
        tokens=manifest["tokens"],
        documents=manifest["documents"],
        tokenizer_path=tokenizer_named(prefix, manifest),
        manifest=manifest,
    )


def _two_meanings(path: str) -> ConfigError:
    if os.path.isdir(os.path.expanduser(path)):
        folder = path.rstrip("/")
        problem = (
            f"there are a folder {folder}/ and token files {path}.bin; write data.path={folder}/ or data.prefix={path}"
        )
    else:
        problem = f"there are a file {path} and token files {path}.bin; write data.prefix={path}, or rename the file"
    return ConfigError("data.path", path, problem)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def cache_folder(config: DataConfig) -> Path:
    """Where prepared data goes, made if it is not there: `data.cache`, or its default. Raises ConfigError."""
    base = config.cache or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "megapar")
    folder = Path(base).expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            "data.cache", folder, f"can't be made: {error.strerror}; name a folder that can be written"
        ) from None
    return folder


# Where the files go


@contextmanager
def new_folder(parent: Path, name: str) -> Iterator[Path]:
    """A temporary folder in `parent`, on the same file system as what it will become.

    Raises UserError where it can't be made, and where what happens in it meets a full disk.
    """
    try:
        # Not tempfile.mkdtemp: that one closes the folder to everyone else, and a cache may be shared.
        folder = parent / f".{name[:40]}-{uuid.uuid4().hex}"
        folder.mkdir()
    except OSError as error:
        raise UserError(f"{parent}: can't be written ({error.strerror}); set data.cache to another folder") from None
    try:
        with _room_in(parent):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def made_once(folder: Path, fill: Callable[[Path], None]) -> Path:
    """A folder that `fill` writes the files of, in a temporary one: made whole or not at all, and found again.

    Raises UserError where it can't be written.
    """
    if not folder.exists():
        with new_folder(folder.parent, folder.name) as temporary:
            whole = temporary / folder.name
            whole.mkdir()
            fill(whole)
            try:
                whole.rename(folder)
            except OSError:  # another process was faster
                if not folder.exists():
                    raise
    return folder


@contextmanager
def _work_folder(parent: Path, name: str, key: str) -> Iterator[Path]:
    """A folder in `parent` for work that the next call with this name and key goes on with if this one is interrupted.

    If another process is at it, a folder of our own. What is left there of other keys, with nobody at it, is removed.
    Raises UserError as `new_folder`.
    """
    stem = f".{name[:40]}-unfinished-"
    folder = parent / f"{stem}{key[:16]}"
    with ExitStack() as held:
        try:
            folder.mkdir(exist_ok=True)
            lock = held.enter_context(open(folder / LOCK, "w"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # somebody is at it, it can't be written, or there are no locks
            with new_folder(parent, name) as own:
                yield own
            return
        for other in parent.glob(f"{glob.escape(stem)}*"):
            if other != folder:
                _remove_if_free(other)
        try:
            with _room_in(parent):
                yield folder
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)  # where it was not renamed


def _remove_if_free(folder: Path) -> None:
    with suppress(OSError), open(folder / LOCK) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _room_in(folder: Path) -> Iterator[None]:
    """Raise UserError, one line, where what happens inside meets a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise UserError(f"{folder}: can't be written ({error.strerror}); make room or use another folder") from None


def _publish(temporary: Path, folder: Path, key: str) -> None:
    """Move a finished folder to its place. Where another launcher was faster, its files stand, if they are intact."""
    for _ in range(10):
        try:
            os.rename(temporary, folder)
            return
        except OSError:
            if _reusable(folder / "tokens", key, lambda line: None):
                return
            # Moved aside in one step, so that half a folder is never seen.
            with new_folder(folder.parent, "broken") as aside:
                try:
                    os.rename(folder, aside / "old")
                except FileNotFoundError:
                    continue
    raise UserError(f"{folder}: can't be replaced; delete it and run again")


def _reusable(prefix: Path, key: str, say: Log) -> Prepared | None:
    """The corpus at `prefix` if it is there, made with `key`, and intact."""
    if not os.path.exists(f"{prefix}.json"):
        return None
    try:
        manifest = check(prefix, "quick")
    except UserError as error:
        say(f"data: prepared files are made anew: {error}")
        return None
    if manifest.get("key") != key:
        return None
    if skipped := manifest["source"].get("skipped"):
        say(f"data: {manifest['source']['name']}: {skipped_text(skipped)}")
    return open_prepared(prefix)


def _prepare_at(
    prefix: Path, source: TextSource, config: DataConfig, settings: dict[str, Any], key: str, say: Log
) -> Prepared:
    """Prepare text at a place that the user named. What lies there is replaced only if it is ours."""
    if ready := _reusable(prefix, key, say):
        return ready
    exists = [end for end in FILES if os.path.exists(f"{prefix}{end}")]
    if exists and not os.path.exists(f"{prefix}.json"):
        raise ConfigError(
            "out", prefix, f"{prefix}{exists[0]} exists and was not made by megapar; choose another PREFIX"
        )
    read_manifest(prefix)  # raises if that file is not ours
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("out", prefix, f"its folder can't be made: {error.strerror}") from None
    with _work_folder(prefix.parent, prefix.name, key) as temporary:
        make_token_files(temporary / "tokens", source, config, settings, key, say)
        # Without a manifest while the files are replaced, and with it only when they are complete.
        Path(f"{prefix}.json").unlink(missing_ok=True)
        for end in (*FILES, ".json"):
            if os.path.exists(made := f"{temporary / 'tokens'}{end}"):
                os.replace(made, f"{prefix}{end}")
            else:  # of another tokenizer than before
                Path(f"{prefix}{end}").unlink(missing_ok=True)
    return open_prepared(prefix)


# Token files that exist


def _open_token_files(path: str, config: DataConfig, say: Log) -> Prepared:
    """Open token files. A description made here unasked (of another project's corpus) is made anew when they change."""
    prefix = Path(path).expanduser().absolute()
    described = _described(prefix)
    if os.path.exists(f"{prefix}.json"):
        manifest = read_manifest(prefix)
        assert manifest is not None
        if manifest["source"].get("kind") != DESCRIBED or manifest.get("described") == described:
            return open_prepared(prefix)
        say(f"data: {prefix.name}: the token files are not those that {prefix.name}.json describes")
    if os.access(prefix.parent, os.W_OK):
        with _room_in(prefix.parent):
            _describe(prefix, prefix.name, described, say)
        return open_prepared(prefix)
    # A folder in the cache with links to the files, so that everything else still needs one PREFIX only.
    folder = cache_folder(config) / f"{prefix.name[:40]}-{_hash([str(prefix), described])[:16]}"
    if not os.path.exists(folder / "tokens.json"):
        with new_folder(folder.parent, prefix.name) as temporary:
            for end in described["files"]:
                os.symlink(f"{prefix}{end}", temporary / f"tokens{end}")
            _describe(temporary / "tokens", prefix.name, described, say)
            try:
                os.rename(temporary, folder)
            except OSError:  # another launcher was faster
                if not os.path.exists(folder / "tokens.json"):
                    raise
    return open_prepared(folder / "tokens")


def _described(prefix: Path) -> dict[str, Any]:
    """What a description made unasked speaks of: another one is made as soon as this differs."""
    files = {}
    for end in (".bin", ".idx", *ENDINGS.values()):
        if os.path.isfile(path := f"{prefix}{end}"):
            info = os.stat(path)
            files[end] = [info.st_size, info.st_mtime_ns]
    return {"code": CODE_VERSION, "files": files}


def _describe(prefix: Path, name: str, described: dict[str, Any], say: Log) -> None:
    """Make split hashes and manifest of token files whose tokenizer is not known, or lies beside them."""
    say(f"data: {name}: token files without a manifest: reading them once to make it")
    corpus = IndexedTokens(prefix)
    if corpus.num_tokens == 0:
        raise UserError(f"{prefix}.bin: offset 0: no tokens in it; check data.path")
    hashes = token_hashes(corpus.tokens, corpus.document_offsets)
    temporary = Path(f"{prefix}.tmp-{os.getpid()}.split.npy")
    np.save(temporary, hashes)
    os.replace(temporary, f"{prefix}.split.npy")
    source = {"kind": DESCRIBED, "name": name}
    manifest = build_manifest(prefix, source=source, tokenizer=None, vocab_size=None, end_of_text=None, key=None)
    if (tokenizer := tokenizer_beside(prefix)) is not None:
        _check_tokenizer(tokenizer, prefix, manifest["max_token"])
    write_manifest(prefix, manifest | {"described": described})


def _check_tokenizer(path: Path, prefix: Path, max_token: int) -> None:
    """Raises UserError if a tokenizer that lies beside token files can't be theirs."""
    entries = open_tokenizer(path).vocab_size
    if entries <= max_token:
        raise UserError(
            f"{path}: a tokenizer of {entries} entries, and {prefix}.bin has token {max_token}: "
            "of another corpus; move it away or put theirs there"
        )
