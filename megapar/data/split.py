"""The train/validation split: a document's hash decides, so other documents never move it."""

import hashlib
from pathlib import Path

import numpy as np

from megapar.config.errors import ConfigError, UserError

CHUNK = 1 << 18  # tokens hashed at once, bounds the temporary arrays
_POSITION, _ID = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)


def text_hash(text: str) -> int:
    """64-bit hash of a document's text. Taken from text where there is one: the split then outlives the tokenizer."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def token_hashes(tokens: np.ndarray, document_offsets: np.ndarray) -> np.ndarray:
    """64-bit hashes of documents known only as tokens, uint64 [documents]: of every id, its place, and the length.

    tokens: integer [tokens]; document_offsets: int64 [documents + 1]. The sum over a document of splitmix64 of
    (place, id), so a corpus is read once, in chunks, whatever the lengths.
    (`time megapar data data.path=PREFIX` of 1e9 tokens in 1e6 documents: 10 s, the manifest included.)
    """
    lengths = np.diff(document_offsets)
    sums = np.zeros(len(lengths), dtype=np.uint64)
    begin, total = int(document_offsets[0]), int(document_offsets[-1])
    while begin < total:
        end = min(begin + CHUNK, total)
        first = int(np.searchsorted(document_offsets, begin, side="right")) - 1
        last = int(np.searchsorted(document_offsets, end, side="left"))
        origins = document_offsets[first:last]
        starts = np.maximum(origins, begin) - begin  # in the chunk, of each document's part of it
        counts = np.diff(starts, append=end - begin)
        places = np.arange(begin, end) - np.repeat(origins, counts)
        mixed = _splitmix64(places.astype(np.uint64) * _POSITION + tokens[begin:end].astype(np.uint64) * _ID)
        filled = counts > 0
        sums[first:last][filled] += np.add.reduceat(mixed, starts[filled])
        begin = end
    return _splitmix64(sums + lengths.astype(np.uint64) * _POSITION)


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every bit of the input moves every bit of the output (uint64, elementwise)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def held_out(hashes: np.ndarray, holdout: float) -> np.ndarray:
    """Which documents are for validation: those whose hash lies in the first `holdout` of its range; bool [documents].

    Where that leaves one side empty, the document with the smallest (for validation) or largest hash (for training)
    goes there, with its exact copies. Documents that are all alike can't be split: they are all for training.
    Raises ConfigError for `data.split` outside 0 <= holdout < 1.
    """
    check_holdout(holdout)
    if holdout == 0 or len(hashes) == 0 or hashes.min() == hashes.max():
        return np.zeros(len(hashes), dtype=bool)
    mask = hashes < np.uint64(int(holdout * 2**64))
    if not mask.any():
        mask = hashes == hashes.min()
    elif mask.all():
        mask = hashes != hashes.max()
    return mask


def check_holdout(holdout: float) -> None:
    """Raises ConfigError where `data.split` is no share."""
    if not 0 <= holdout < 1:
        raise ConfigError("data.split", holdout, "must be at least 0 and below 1")


def load_hashes(prefix: str, documents: int) -> np.ndarray | None:
    """The hashes that `prepare` left in `prefix`.split.npy, uint64 [documents]; None where there is no such file."""
    path = Path(f"{prefix}.split.npy")
    if not path.exists():
        return None
    try:
        hashes: np.ndarray = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: offset 0: not an array of document hashes ({error}); prepare the corpus anew"
        ) from None
    if hashes.shape != (documents,) or hashes.dtype != np.uint64:
        raise UserError(
            f"{path}: offset 0: {hashes.dtype} {hashes.shape}, not the hashes of {documents} documents; "
            "prepare the corpus anew"
        )
    return hashes
