"""The split depends on the documents alone: not on their order, nor on what else is there."""

import sys
import time
from typing import Any

import numpy as np
import pytest

from megapar.config.errors import ConfigError
from megapar.data.split import CHUNK, held_out, text_hash, token_hashes


def hashes_of(documents: list[list[int]], dtype: str = "<u2") -> np.ndarray:
    offsets = np.cumsum([0, *map(len, documents)])
    return token_hashes(np.array([token for document in documents for token in document], dtype=dtype), offsets)


def random_documents(count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 50, size=rng.integers(1, 100)).tolist() for _ in range(count)]


def test_token_hashes_depend_on_the_document_alone() -> None:
    documents = random_documents(200)
    hashes = hashes_of(documents)
    order = np.random.default_rng(1).permutation(200)
    assert (hashes_of([documents[number] for number in order]) == hashes[order]).all()
    assert (hashes_of(documents, "<i4") == hashes).all()
    assert (hashes_of(documents + random_documents(50, seed=2))[:200] == hashes).all()


def test_token_hashes_see_ids_order_and_length() -> None:
    variants = [[], [0], [0, 0], [1], [1, 2], [2, 1], [3] * 64, [3] * 65, [3] * 63 + [4]]
    assert len(set(hashes_of(variants).tolist())) == len(variants)


def test_token_hashes_see_the_whole_document() -> None:
    """Packed rows that begin alike and have one length: a change anywhere, and an exchange of two parts, is another."""
    row = np.random.default_rng(0).integers(0, 30_000, 3 * CHUNK // 2)
    variants = [row]
    for place in (0, 63, 64, CHUNK - 1, CHUNK, len(row) - 1):
        variants.append(row.copy())
        variants[-1][place] += 1
    half = len(row) // 2
    variants.append(np.concatenate([row[half:], row[:half]]))
    hashes = hashes_of([variant.tolist() for variant in variants])
    assert len(set(hashes.tolist())) == len(variants)


def test_documents_that_begin_alike_are_split_independently() -> None:
    rng = np.random.default_rng(0)
    for head in rng.integers(0, 30_000, (5, 64)).tolist():
        mask = held_out(hashes_of([head + rng.integers(0, 30_000, 192).tolist() for _ in range(1000)]), 0.1)
        assert mask.mean() == pytest.approx(0.1, abs=0.04)


@pytest.mark.parametrize("chunk", [1, 2, 7, 100])
def test_token_hashes_do_not_depend_on_the_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [[], *random_documents(60), [], [], [5], []]
    expected = hashes_of(documents)
    monkeypatch.setattr("megapar.data.split.CHUNK", chunk)
    assert (hashes_of(documents) == expected).all()


def documents_of_four(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and offsets; a thousandth of the documents are empty."""
    lengths = np.full(count, 4)
    lengths[: count // 1000] = 0
    return np.arange(count * 4, dtype="<u2"), np.concatenate([[0], np.cumsum(lengths)])


def test_token_hashes_of_many_documents_take_as_few_calls_as_of_few() -> None:
    """Calls of Python and of C, as a profiler sees them: numpy does the rest, whatever the number of documents."""

    def calls(count: int) -> int:
        given, seen = documents_of_four(count), 0

        def profile(*_: Any) -> None:
            nonlocal seen
            seen += 1

        sys.setprofile(profile)
        try:
            hashes = token_hashes(*given)
        finally:
            sys.setprofile(None)
        assert hashes.shape == (count,)
        return seen

    calls(1000)  # what is made once
    few, many = calls(1000), calls(100_000)
    assert 0 < many < 2 * few < 1000


@pytest.mark.slow
def test_token_hashes_of_a_million_documents_take_under_two_seconds() -> None:
    given = documents_of_four(1_000_000)
    begin = time.perf_counter()
    token_hashes(*given)
    assert time.perf_counter() - begin < 4  # 1 s alone; a busy machine gets room


@pytest.mark.parametrize("holdout", [0.05, 0.5, 0.95])
def test_the_share_is_met(holdout: float) -> None:
    hashes = hashes_of(random_documents(4000))
    assert held_out(hashes, holdout).mean() == pytest.approx(holdout, abs=0.03)
    texts = np.array([text_hash(f"document {number}") for number in range(4000)], dtype=np.uint64)
    assert held_out(texts, holdout).mean() == pytest.approx(holdout, abs=0.03)


def test_similar_documents_are_split_independently() -> None:
    """Documents that differ in one id only: a weak hash would walk through them in step."""
    mask = held_out(hashes_of([[number] for number in range(8000)]), 0.5)
    for lag in range(1, 8):
        assert (mask[lag:] & mask[:-lag]).mean() == pytest.approx(0.25, abs=0.03)


def test_appending_moves_no_document() -> None:
    documents = random_documents(300)
    before = held_out(hashes_of(documents), 0.2)
    after = held_out(hashes_of(random_documents(100, seed=5) + documents), 0.2)
    assert (after[100:] == before).all()


def test_an_empty_side_gets_the_nearest_document() -> None:
    hashes = np.array([5, 3, 9, 3], dtype=np.uint64) << np.uint64(60)
    assert held_out(hashes, 0.01).tolist() == [False, True, False, True]
    assert held_out(hashes, 0.99).tolist() == [True, True, False, True]


def test_nothing_is_held_out_where_it_can_not_be() -> None:
    assert held_out(np.array([], dtype=np.uint64), 0.5).tolist() == []
    assert held_out(np.array([7, 7], dtype=np.uint64), 0.5).tolist() == [False, False]
    assert held_out(np.array([1, 7], dtype=np.uint64), 0.0).tolist() == [False, False]


@pytest.mark.parametrize("holdout", [-0.1, 1.0, float("nan")])
def test_a_share_outside_the_range_is_refused(holdout: float) -> None:
    with pytest.raises(ConfigError, match=r"data\.split"):
        held_out(np.array([1, 2], dtype=np.uint64), holdout)
