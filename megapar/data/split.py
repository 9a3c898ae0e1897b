"""The train/validation split: a document's hash decides, so other documents never move it."""

import hashlib
from pathlib import Path

import numpy as np

from megapar.config.errors import ConfigError, UserError

HEAD = 64  # tokens of a document that its hash looks at, besides its length
CHUNK = 65536  # documents hashed at once, bounds the temporary arrays


def text_hash(text: str) -> int:
    """64-bit hash of a document's text. Taken from text where there is one: the split then outlives the tokenizer."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def token_hashes(tokens: np.ndarray, document_offsets: np.ndarray) -> np.ndarray:
    """64-bit hashes of documents known only as tokens: of the first HEAD ids and the length; uint64 [documents].

    tokens: integer [tokens]; document_offsets: int64 [documents + 1]. A multilinear hash over random odd factors,
    whose result goes through splitmix64: 1M documents take under a second.
    """
    lengths = np.diff(document_offsets)
    if len(tokens) == 0:
        return np.zeros(len(lengths), dtype=np.uint64)
    hashes = np.empty(len(lengths), dtype=np.uint64)
    # random_raw, unlike Generator's methods, never changes between numpy versions.
    factors = np.random.Philox(key=0).random_raw(HEAD + 1) | np.uint64(1)
    columns = np.arange(HEAD)
    for begin in range(0, len(lengths), CHUNK):
        size = lengths[begin : begin + CHUNK, None]
        inside = columns < size
        places = np.where(inside, document_offsets[begin : begin + len(size), None] + columns, 0)
        ids = np.where(inside, tokens[places], 0).astype(np.uint64)
        hashes[begin : begin + CHUNK] = ids @ factors[:HEAD] + size[:, 0].astype(np.uint64) * factors[HEAD]
    return _splitmix64(hashes)


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
