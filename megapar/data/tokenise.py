"""Text -> token files: measure the documents, train or copy the tokenizer, tokenise, describe."""

import platform
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from megapar.config.errors import ConfigError
from megapar.config.schema import DataConfig
from megapar.data.corpus import TextSource, counted, skipped_text
from megapar.data.indexed import IndexedWriter, token_dtype
from megapar.data.manifest import build_manifest, write_manifest
from megapar.data.split import held_out, text_hash
from megapar.data.tokenizer import Tokenizer, open_tokenizer
from megapar.data.tokenizer.files import copy_beside, find_tokenizer, identity
from megapar.data.tokenizer.train import BYTE_ENTRIES, BYTES, MADE, TRAINER, make_tokenizer

# Of what this module writes. Raise it when the same text would give other files: old ones are then not reused.
CODE_VERSION = 1
TRAINING_CHARS = 4_000_000  # text that the tokenizer is trained on: more changes little and costs time
BATCH_CHARS = 4_000_000  # text tokenised at once
SAY_S = 5.0

Log = Callable[[str], Any]


def token_file_settings(config: DataConfig, source: TextSource) -> dict[str, Any]:
    """Everything besides the text that the files depend on."""
    python = platform.python_version() if source.kind == "stdlib" else None
    return {"code": CODE_VERSION, "kind": source.kind, "python": python, "tokenizer": tokenizer_settings(config)}


def tokenizer_settings(config: DataConfig) -> dict[str, Any]:
    """What tokens depend on besides the text."""
    if config.tokenizer not in MADE:
        return identity(find_tokenizer(config.tokenizer))
    import sentencepiece

    if config.tokenizer == BYTES:
        return {"sentencepiece": sentencepiece.__version__, "bytes": BYTE_ENTRIES, "trainer": TRAINER}
    return {
        "sentencepiece": sentencepiece.__version__,
        "vocab_size": config.vocab_size,
        "trainer": TRAINER,
        "trained_on": {"characters": TRAINING_CHARS, "not_held_out_by": config.split},
    }


def make_token_files(
    prefix: Path, source: TextSource, config: DataConfig, settings: dict[str, Any], key: str, say: Log
) -> None:
    """Write all files of a corpus at `prefix`, the manifest last. It goes on with what an interrupted call left."""
    source.keep_text()
    if source.skipped:
        say(f"data: {source.name}: {skipped_text(source.skipped)}")
    tokenizer = None if config.tokenizer in MADE else open_tokenizer(config.tokenizer)
    if tokenizer is not None:
        _ = tokenizer.end_of_text  # refuses where there is none
        copy_beside(tokenizer.path, prefix)
    sizes, hashes = _measure(source)
    say(f"data: {source.name}: {counted(len(sizes), 'document')}, {sizes.sum() / 1e6:.1f} M characters")
    model_path = Path(f"{prefix}.model")
    if tokenizer is None and not model_path.exists():
        begin = time.perf_counter()
        texts = _training_texts(source, sizes, hashes, config.split)
        made = make_tokenizer(config.tokenizer, texts, config.vocab_size, model_path)
        say(f"data: {made} in {time.perf_counter() - begin:.1f} s")
    tokenizer = tokenizer or open_tokenizer(model_path)
    if tokenizer.char_counts() is None:
        name = tokenizer.path.name
        say(f"data: {source.name}: {name} changes text on its way in, so no bits per character can be given")
    begin = time.perf_counter()
    written = _tokenise(prefix, source, tokenizer, sizes, say)
    if written != len(sizes) or source.changed():
        raise ConfigError("data.path", config.path, "the text changed while it was read; run again when it is at rest")
    np.save(f"{prefix}.split.npy", hashes)
    manifest = build_manifest(
        prefix,
        source={
            "kind": source.kind,
            "name": source.name,
            "files": len(source.files),
            "skipped": source.skipped,
            "characters": int(sizes.sum()),
        },
        tokenizer=settings["tokenizer"],
        vocab_size=tokenizer.vocab_size,
        end_of_text=tokenizer.end_of_text,
        key=key,
    )
    write_manifest(prefix, manifest)
    Path(f"{prefix}.lengths").unlink(missing_ok=True)
    say(f"data: {manifest['tokens'] / 1e6:.2f} M tokens in {time.perf_counter() - begin:.1f} s")


def _measure(source: TextSource) -> tuple[np.ndarray, np.ndarray]:
    """(characters, hash) of each document: int64 [documents], uint64 [documents]."""
    sizes, hashes = [], []
    for text in source.documents():
        sizes.append(len(text))
        hashes.append(text_hash(text))
    return np.array(sizes, dtype=np.int64), np.array(hashes, dtype=np.uint64)


def _training_texts(source: TextSource, sizes: np.ndarray, hashes: np.ndarray, holdout: float) -> Iterator[str]:
    """Documents to train the tokenizer on: a random sample of those that are not held out.

    In the order of their hashes, which is random and yet the same wherever the documents lie.
    """
    order = np.argsort(hashes, kind="stable")
    order = order[~held_out(hashes, holdout)[order]]
    before = np.cumsum(sizes[order]) - sizes[order]
    chosen = set(order[before < TRAINING_CHARS].tolist())
    for number, text in enumerate(source.documents()):
        if number in chosen:
            yield text


def _tokenise(prefix: Path, source: TextSource, tokenizer: Tokenizer, sizes: np.ndarray, say: Log) -> int:
    """Write the ids of each document, the end-of-text token behind it. Returns how many documents there are.

    A line says how far it is, every SAY_S seconds. sizes: characters by document
    """
    dtype = token_dtype(tokenizer.vocab_size)
    writer, total = IndexedWriter(prefix, dtype), max(1, int(sizes.sum()))
    ends = np.concatenate([[0], np.cumsum(sizes)])

    def share() -> str:
        return f"{ends[min(writer.documents, len(sizes))] / total:.0%} of {total / 1e6:.1f} M characters"

    if writer.documents:
        say(f"data: {source.name}: goes on after {share()}")
    said = time.monotonic()
    try:
        for texts in _batches(islice(source.documents(), writer.documents, None)):
            tokens = tokenizer.encode_batch(texts)
            writer.add([np.array([*ids, tokenizer.end_of_text], dtype=dtype) for ids in tokens])
            if time.monotonic() - said > SAY_S:
                say(f"data: {source.name}: tokenized {share()}")
                said = time.monotonic()
        return writer.finish()
    except KeyboardInterrupt:
        say(f"data: {source.name}: interrupted after {share()}; the same command goes on from there")
        raise
    finally:
        writer.close()


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
