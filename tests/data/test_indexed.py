"""The token files are Megatron's, byte for byte, and every fault is refused with file and offset."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapar.config.errors import UserError
from megapar.data.indexed import CODES, DTYPES, IndexedTokens, token_dtype, write_indexed

DOCUMENTS = [[5, 6, 7], [8], [], [9, 10]]


def write(prefix: Path, documents: list[list[int]] = DOCUMENTS, dtype: str = "<u2") -> Path:
    write_indexed(prefix, [np.array(document, dtype=np.int64) for document in documents], np.dtype(dtype))
    return prefix


def index_bytes(
    lengths: list[int],
    pointers: list[int],
    documents: list[int],
    *,
    magic: bytes = b"MMIDIDX\x00\x00",
    version: int = 1,
    code: int = 8,
) -> bytes:
    """An index written by hand, from the format's description."""
    head = magic + struct.pack("<Q", version) + struct.pack("<B", code)
    head += struct.pack("<Q", len(lengths)) + struct.pack("<Q", len(documents))
    return head + struct.pack(f"<{len(lengths)}i{len(pointers)}q{len(documents)}q", *lengths, *pointers, *documents)


def test_the_writer_writes_megatrons_layout(tmp_path: Path) -> None:
    write(tmp_path / "c")
    assert (tmp_path / "c.bin").read_bytes() == struct.pack("<6H", 5, 6, 7, 8, 9, 10)
    assert (tmp_path / "c.idx").read_bytes() == index_bytes([3, 1, 0, 2], [0, 6, 8, 8], [0, 1, 2, 3, 4])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.bin", "c.idx"]


@pytest.mark.parametrize("modes", [b"", b"\x00\x01\x00"])
def test_the_reader_groups_sequences_to_documents(tmp_path: Path, modes: bytes) -> None:
    (tmp_path / "c.bin").write_bytes(struct.pack("<6i", 1, 2, 3, 4, 5, 6))
    (tmp_path / "c.idx").write_bytes(index_bytes([2, 1, 3], [0, 8, 12], [0, 2, 2, 3], code=4) + modes)
    corpus = IndexedTokens(tmp_path / "c")
    assert (corpus.num_tokens, corpus.num_sequences, corpus.num_documents) == (6, 3, 3)
    assert [corpus.document(number).tolist() for number in range(3)] == [[1, 2, 3], [], [4, 5, 6]]
    assert corpus.lengths.tolist() == [2, 1, 3]
    assert corpus.tokens.dtype == np.int32


@settings(max_examples=50, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 100), max_size=5), max_size=8),
    dtype=st.sampled_from(sorted(DTYPES.values(), key=str)),
)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], dtype: np.dtype
) -> None:
    prefix = tmp_path_factory.mktemp("tokens") / "c"
    assert write_indexed(prefix, [np.array(ids, dtype=np.int64) for ids in documents], dtype) == len(documents)
    corpus = IndexedTokens(prefix)
    assert corpus.dtype == dtype
    assert [corpus.document(number).tolist() for number in range(corpus.num_documents)] == documents


def test_dtypes() -> None:
    assert {code: dtype.name for code, dtype in DTYPES.items()} == {
        1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16",
    }  # fmt: skip
    assert (token_dtype(65_499).name, token_dtype(65_500).name) == ("uint16", "int32")


@pytest.mark.parametrize(("dtype", "ids"), [("<u2", [65_536]), ("<u2", [-1]), ("i1", [128])])
def test_ids_that_do_not_fit_are_refused_and_leave_nothing(tmp_path: Path, dtype: str, ids: list[int]) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        write(tmp_path / "c", [ids], dtype)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_old_files(tmp_path: Path) -> None:
    write(tmp_path / "c")
    before = (tmp_path / "c.bin").read_bytes(), (tmp_path / "c.idx").read_bytes()
    with pytest.raises(ValueError, match="do not fit"):
        write(tmp_path / "c", [[1], [-1]])
    assert ((tmp_path / "c.bin").read_bytes(), (tmp_path / "c.idx").read_bytes()) == before


def test_whoever_reads_the_old_files_is_not_disturbed(tmp_path: Path) -> None:
    corpus = IndexedTokens(write(tmp_path / "c"))
    write(tmp_path / "c", [[1, 1, 1, 1, 1, 1]])
    assert corpus.tokens.tolist() == [5, 6, 7, 8, 9, 10]


def test_float_dtypes_have_no_place(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no code"):
        write(tmp_path / "c", dtype="<f4")
    assert np.dtype("<f4") not in CODES


@pytest.mark.parametrize(
    ("index", "offset", "problem"),
    [
        pytest.param(b"", 0, "truncated", id="empty"),
        pytest.param(index_bytes([3], [0], [0, 1])[:20], 20, "truncated", id="header cut"),
        pytest.param(index_bytes([3], [0], [0, 1])[:-1], 61, "truncated", id="last byte cut"),
        pytest.param(index_bytes([3], [0], [0, 1]) + b"\0\0", 62, "truncated or damaged", id="trailing bytes"),
        pytest.param(
            index_bytes([3], [0], [0, 1], magic=b"PK\x03\x04\x00\x00\x00\x00\x00"), 0, "not a Megatron", id="magic"
        ),
        pytest.param(index_bytes([3], [0], [0, 1], version=2), 9, "version 2", id="version"),
        pytest.param(index_bytes([3], [0], [0, 1], code=7), 17, "dtype code 7", id="float dtype"),
        pytest.param(index_bytes([3], [0], [0, 1], code=99), 17, "dtype code 99", id="unknown dtype"),
        pytest.param(index_bytes([3], [0], []), 26, "document index is empty", id="no document index"),
        pytest.param(index_bytes([-1, 4], [0, 0], [0, 2]), 34, "sequence 0 has -1", id="negative length"),
        pytest.param(index_bytes([4, -1], [0, 8], [0, 2]), 38, "sequence 1 has -1", id="negative second length"),
        pytest.param(index_bytes([1, 2], [0, 900], [0, 2]), 50, "byte 900", id="pointer out of range"),
        pytest.param(index_bytes([1, 2], [0, -2], [0, 2]), 50, "byte -2", id="pointer negative"),
        pytest.param(index_bytes([1, 2], [0, 0], [0, 2]), 50, "byte 0", id="sequences overlap"),
        pytest.param(index_bytes([1, 2], [4, 0], [0, 2]), 42, "byte 4", id="pointers backward"),
        pytest.param(index_bytes([1, 2], [0, 2], [1, 2]), 58, "begins at sequence 1", id="first document"),
        pytest.param(index_bytes([1, 2], [0, 2], [0, 3, 2]), 66, "entry 1 is 3", id="document out of range"),
        pytest.param(index_bytes([1, 2], [0, 2], [0, -1, 2]), 66, "entry 1 is -1", id="document negative"),
        pytest.param(index_bytes([1, 2], [0, 2], [0, 2, 1, 2]), 74, "entry 2 is 1", id="documents backward"),
        pytest.param(index_bytes([1, 2], [0, 2], [0, 1]), 66, "end at sequence 1", id="sequences without document"),
    ],
)
def test_a_faulty_index_is_refused_with_file_and_offset(
    tmp_path: Path, index: bytes, offset: int, problem: str
) -> None:
    (tmp_path / "c.bin").write_bytes(struct.pack("<3H", 1, 2, 3))
    (tmp_path / "c.idx").write_bytes(index)
    with pytest.raises(UserError, match=rf"c\.idx: offset {offset}: .*{problem}"):
        IndexedTokens(tmp_path / "c")


@pytest.mark.parametrize("count", [2**31, 2**63, 2**64 - 1])
def test_absurd_counts_allocate_nothing(tmp_path: Path, count: int) -> None:
    (tmp_path / "c.bin").write_bytes(b"")
    (tmp_path / "c.idx").write_bytes(struct.pack("<9sQBQQ", b"MMIDIDX", 1, 8, count, count))
    with pytest.raises(UserError, match="offset 34: 34 bytes, the header promises"):
        IndexedTokens(tmp_path / "c")


@pytest.mark.parametrize(("size", "offset"), [(6, 6), (11, 11), (13, 12), (24, 12), (0, 0)])
def test_a_bin_of_the_wrong_size_is_refused(tmp_path: Path, size: int, offset: int) -> None:
    write(tmp_path / "c")
    (tmp_path / "c.bin").write_bytes((b"\x01\x00" * 20)[:size])
    with pytest.raises(UserError, match=rf"c\.bin: offset {offset}: {size} bytes, .* describes 12"):
        IndexedTokens(tmp_path / "c")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write(tmp_path / "c")
    (tmp_path / "c.bin").unlink()
    with pytest.raises(UserError, match=r"c\.bin: can't be read"):
        IndexedTokens(tmp_path / "c")


def test_any_changed_byte_of_an_index_is_refused_or_harmless(tmp_path: Path, flip: Callable[[str, int], None]) -> None:
    """No flipped bit makes the reader crash, or read outside the files."""
    write(tmp_path / "c")
    for offset in range((tmp_path / "c.idx").stat().st_size):
        flip(f"{tmp_path}/c.idx", offset)
        try:
            corpus = IndexedTokens(tmp_path / "c")
            assert sum(len(corpus.document(number)) for number in range(corpus.num_documents)) == corpus.num_tokens
        except UserError as error:
            assert "offset" in str(error)
        flip(f"{tmp_path}/c.idx", offset)
