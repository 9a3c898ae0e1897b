"""Megatron's token files: `PREFIX.bin` holds the ids of all sequences end to end, `PREFIX.idx` describes them.

Layout of `.idx` (version 1, little-endian, no padding):

    offset 0    9 bytes   magic "MMIDIDX" and two zero bytes
           9    uint64    version, 1
           17   uint8     dtype code of the ids (DTYPES)
           18   uint64    S, number of sequences
           26   uint64    D, entries of the document index: documents + 1
           34   int32[S]  tokens of each sequence
                int64[S]  byte offset of each sequence in `.bin`
                int64[D]  first sequence of each document, and S at the end
                int8[S]   optional: mode of each sequence (multimodal corpora); not used here
"""

import os
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megapar.config.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
VERSION = 1
DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype of ids on disk: uint16 where the vocabulary is below 65,500, else int32 (Megatron's rule)."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def has_token_files(prefix: str | Path) -> bool:
    """Whether both files of a corpus exist."""
    return all(os.path.isfile(os.path.expanduser(f"{prefix}{end}")) for end in (".bin", ".idx"))


def _fault(path: str, offset: int, problem: str) -> UserError:
    return UserError(f"{path}: offset {offset}: {problem}")


def _open(path: str) -> np.ndarray:
    """The bytes of a file, mapped, not read: uint8 of shape [size]."""
    try:
        if os.path.getsize(path) == 0:  # an empty file can't be mapped
            return np.empty(0, dtype=np.uint8)
        # A plain view: slicing a memmap object costs several times as much.
        return np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); check data.path") from None


class IndexedTokens:
    """A corpus on disk, mapped into memory and checked.

    tokens            ids of the whole corpus, end to end; [num_tokens] of `dtype`
    lengths           tokens of each sequence; int32 [num_sequences]
    document_offsets  where each document begins in `tokens`, and num_tokens at the end; int64 [num_documents + 1]

    Raises UserError naming file and byte offset where the files are truncated, malformed or don't belong together.
    Sequences must lie end to end, as Megatron writes them: no gaps, no overlaps.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self._path = f"{self.prefix}.idx"
        index = _open(self._path)
        self.dtype, self.num_sequences, entries = self._header(index)
        self.num_documents = entries - 1
        offset = HEADER.size
        self.lengths, offset = self._array(index, offset, "<i4", self.num_sequences)
        pointers, offset = self._array(index, offset, "<i8", self.num_sequences)
        document_index, offset = self._array(index, offset, "<i8", entries)

        starts = self._check_sequences(pointers)
        self._check_documents(document_index)
        self.num_tokens = int(starts[-1])
        self.document_offsets = starts[document_index]
        self.tokens = self._map_tokens()

    def document(self, number: int) -> np.ndarray:
        """Ids of one document, a view of shape [its tokens]."""
        return self.tokens[self.document_offsets[number] : self.document_offsets[number + 1]]

    def _header(self, index: np.ndarray) -> tuple[np.dtype, int, int]:
        """(dtype of the ids, number of sequences, entries of the document index), held against the file's size."""
        if len(index) < HEADER.size:
            raise _fault(self._path, len(index), f"the file ends inside the header of {HEADER.size} bytes: truncated")
        magic, version, code, sequences, entries = HEADER.unpack(index[: HEADER.size].tobytes())
        if magic != MAGIC:
            raise _fault(self._path, 0, f"not a Megatron index: it begins with {magic!r}, not {MAGIC!r}")
        if version != VERSION:
            raise _fault(self._path, 9, f"index version {version} is unknown; version {VERSION} is needed")
        if code not in DTYPES:
            known = ", ".join(f"{number} {dtype.name}" for number, dtype in DTYPES.items())
            raise _fault(self._path, 17, f"dtype code {code} is not one of token ids ({known})")
        if entries == 0:
            raise _fault(self._path, 26, "the document index is empty; it has one entry more than documents")
        expected = HEADER.size + 12 * sequences + 8 * entries
        if len(index) not in (expected, expected + sequences):
            end = min(len(index), expected)
            raise _fault(self._path, end, f"{len(index)} bytes, the header promises {expected}: truncated or damaged")
        return DTYPES[code], sequences, entries

    @staticmethod
    def _array(index: np.ndarray, offset: int, dtype: str, count: int) -> tuple[np.ndarray, int]:
        """(array of `count` elements at byte `offset`, offset behind it). Copied: in the file it is not aligned."""
        end = offset + count * np.dtype(dtype).itemsize
        return index[offset:end].copy().view(dtype), end

    def _check_sequences(self, pointers: np.ndarray) -> np.ndarray:
        """First token of each sequence, and the number of tokens at the end; int64 [num_sequences + 1]."""
        negative = np.flatnonzero(self.lengths < 0)
        if len(negative):
            first = int(negative[0])
            raise _fault(self._path, HEADER.size + 4 * first, f"sequence {first} has {self.lengths[first]} tokens")
        starts = np.zeros(self.num_sequences + 1, dtype=np.int64)
        np.cumsum(self.lengths, dtype=np.int64, out=starts[1:])
        wrong = np.flatnonzero(pointers != starts[:-1] * self.dtype.itemsize)
        if len(wrong):
            first = int(wrong[0])
            raise _fault(
                self._path,
                HEADER.size + 4 * self.num_sequences + 8 * first,
                f"sequence {first} is said to begin at byte {pointers[first]} of {self.prefix}.bin, "
                f"the sequences before it end at byte {starts[first] * self.dtype.itemsize}",
            )
        return starts

    def _check_documents(self, document_index: np.ndarray) -> None:
        base = HEADER.size + 12 * self.num_sequences
        last = self.num_documents
        if document_index[0] != 0:
            raise _fault(self._path, base, f"the first document begins at sequence {document_index[0]}, not 0")
        outside = (document_index < 0) | (document_index > self.num_sequences)
        backward = np.zeros_like(outside)
        backward[1:] = document_index[1:] < document_index[:-1]
        wrong = np.flatnonzero(outside | backward)
        if len(wrong):
            first = int(wrong[0])
            raise _fault(
                self._path,
                base + 8 * first,
                f"document index entry {first} is {document_index[first]}: "
                f"entries must not decrease and lie in 0..{self.num_sequences}",
            )
        if document_index[last] != self.num_sequences:
            raise _fault(
                self._path,
                base + 8 * last,
                f"the documents end at sequence {document_index[last]}, the file has {self.num_sequences} sequences",
            )

    def _map_tokens(self) -> np.ndarray:
        path = f"{self.prefix}.bin"
        data = _open(path)
        expected = self.num_tokens * self.dtype.itemsize
        if len(data) != expected:
            raise _fault(
                path,
                min(len(data), expected),
                f"{len(data)} bytes, {self._path} describes {expected}: truncated, changed or of another corpus",
            )
        return data.view(self.dtype)


def write_indexed(prefix: str | Path, documents: Iterable[np.ndarray], dtype: np.dtype | type) -> int:
    """Write `prefix`.bin and `prefix`.idx, one sequence per document; returns the number of documents.

    documents: integer arrays of shape [tokens of the document]. Both files appear complete or not at all (temporary
    files, then rename). Raises ValueError where an id does not fit `dtype`, or `dtype` has no code in the format.
    """
    dtype = np.dtype(dtype).newbyteorder("<")
    if dtype not in CODES:
        raise ValueError(f"{dtype} has no code in the .idx format; use one of {sorted(kind.name for kind in CODES)}")
    final = [Path(f"{prefix}.bin"), Path(f"{prefix}.idx")]
    temporary = [path.with_name(f"{path.name}.tmp-{os.getpid()}") for path in final]
    try:
        lengths: list[int] = []
        with open(temporary[0], "wb") as file:
            for document in documents:
                ids = np.ascontiguousarray(_cast(document, dtype))
                file.write(ids.data if len(ids) else b"")
                lengths.append(len(ids))
        temporary[1].write_bytes(_index_bytes(lengths, dtype))
        for source, target in zip(temporary, final, strict=True):
            os.replace(source, target)
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)
    return len(lengths)


class IndexedWriter:
    """Writes `prefix`.bin and `prefix`.idx, a sequence per document, so that an interrupted writer can go on.

    What lies there of an earlier writer of the same documents is kept: `documents` says how many are written. `finish`
    makes the index; `prefix`.lengths is then of no more use.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype | type) -> None:
        self.dtype, self._index = np.dtype(dtype).newbyteorder("<"), Path(f"{prefix}.idx")
        paths = Path(f"{prefix}.bin"), Path(f"{prefix}.lengths")
        self._bin, self._lengths = (open(path, "a+b") for path in paths)  # noqa: SIM115 - until `finish` or `close`
        whole = self._written()
        self._lengths.truncate(whole.nbytes)
        self._bin.truncate(int(whole.sum(dtype=np.int64)) * self.dtype.itemsize)
        self.documents = len(whole)

    def _written(self) -> np.ndarray:
        """Lengths of the documents that are there as a whole, int32 [documents]."""
        self._lengths.seek(0)
        data = self._lengths.read()
        lengths = np.frombuffer(data[: len(data) // 4 * 4], dtype="<i4")
        there = os.fstat(self._bin.fileno()).st_size // self.dtype.itemsize
        return lengths[: int(np.searchsorted(np.cumsum(lengths, dtype=np.int64), there, side="right"))]

    def add(self, documents: Sequence[np.ndarray]) -> None:
        """Append documents: integer arrays [tokens of the document]."""
        for document in documents:
            self._bin.write(np.ascontiguousarray(_cast(document, self.dtype)).data if len(document) else b"")
        self._bin.flush()  # before their lengths, which say that they are there
        self._lengths.write(np.array([len(document) for document in documents], dtype="<i4").tobytes())
        self._lengths.flush()
        self.documents += len(documents)

    def finish(self) -> int:
        """Write the index. Returns the number of documents."""
        lengths = self._written().tolist()
        self._index.write_bytes(_index_bytes(lengths, self.dtype))
        return len(lengths)

    def close(self) -> None:
        self._bin.close()
        self._lengths.close()


def _index_bytes(lengths: list[int], dtype: np.dtype) -> bytes:
    count = len(lengths)
    if lengths and max(lengths) > np.iinfo(np.int32).max:
        raise ValueError(f"a document has {max(lengths)} tokens; the format allows 2**31 - 1")
    sizes = np.array(lengths, dtype="<i4")
    pointers = np.zeros(count, dtype="<i8")
    np.cumsum(sizes[:-1] * np.int64(dtype.itemsize), out=pointers[1:])
    header = HEADER.pack(MAGIC, VERSION, CODES[dtype], count, count + 1)
    return header + sizes.tobytes() + pointers.tobytes() + np.arange(count + 1, dtype="<i8").tobytes()


def _cast(document: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if len(document) and not np.can_cast(document.dtype, dtype, "safe"):
        low, high = int(document.min()), int(document.max())
        bounds = np.iinfo(dtype)
        if low < bounds.min or high > bounds.max:
            raise ValueError(f"token ids {low}..{high} do not fit {dtype.name}")
    return document.astype(dtype, copy=False)
