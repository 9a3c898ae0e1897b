"""Every sample once per epoch, in an order that is a function of (seed, epoch, index); splits share no document."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapar.config.errors import ConfigError, UserError
from megapar.config.schema import DataConfig
from megapar.data.indexed import write_indexed
from megapar.data.order import shuffled
from megapar.data.prepare import Prepared
from megapar.data.samples import SampleSet
from megapar.data.split import held_out, token_hashes

END = 0
FIXED_ORDER = [6, 2, 9, 3, 5, 8, 4, 1, 0, 7]


def write_corpus(prefix: Path, documents: int, seed: int = 0, begin: int = 1) -> list[np.ndarray]:
    """Documents of ids that occur nowhere else, each closed by END; returns them."""
    rng = np.random.default_rng(seed)
    written, next_id = [], begin
    for length in rng.integers(1, 60, size=documents):
        written.append(np.append(np.arange(next_id, next_id + length), END))
        next_id += int(length)
    write_indexed(prefix, written, np.int32)
    return written


def open_set(prefix: Path, **changes: object) -> SampleSet:
    options: dict = {"split": "train", "seq_length": 16, "seed": 7, "holdout": 0.3} | changes
    return SampleSet(str(prefix), **options)


@settings(max_examples=150, deadline=None)
@given(count=st.integers(1, 700), seed=st.integers(0, 2**40), epoch=st.integers(0, 1000))
def test_the_order_is_a_permutation(count: int, seed: int, epoch: int) -> None:
    assert sorted(shuffled(position, count, seed, epoch) for position in range(count)) == list(range(count))


def test_the_order_is_fixed_for_all_time() -> None:
    """A changed permutation would silently change what a resumed run reads."""
    assert [shuffled(position, 10, 1234, 0) for position in range(10)] == FIXED_ORDER


def test_the_order_looks_random() -> None:
    count, epochs = 12, 6000
    hits = np.zeros((count, count))
    pairs = 0
    for epoch in range(epochs):
        order = [shuffled(position, count, 3, epoch) for position in range(count)]
        hits[np.arange(count), order] += 1
        pairs += sum(after == before + 1 for before, after in pairwise(order))
    expected = epochs / count
    # chi-square with 121 degrees of freedom: 99.99 % lie below 185
    assert ((hits - expected) ** 2 / expected).sum() < 185
    assert pairs / epochs == pytest.approx((count - 1) / count, abs=0.06)


def test_a_large_epoch_is_spread_evenly() -> None:
    count = 10**12 + 39
    places = np.array([shuffled(position, count, 1, 0) for position in range(4000)]) / count
    assert np.histogram(places, bins=10, range=(0, 1))[0] == pytest.approx([400] * 10, abs=90)
    assert np.corrcoef(places[:-1], places[1:])[0, 1] == pytest.approx(0, abs=0.06)


def test_an_epoch_has_every_window_once_and_epochs_differ(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", 80)
    samples = open_set(tmp_path / "c")
    count = samples.num_samples
    epochs = [[samples.window(epoch * count + position) for position in range(count)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    other = open_set(tmp_path / "c", seed=8)
    assert [other.window(position) for position in range(count)] != epochs[0]


def test_samples_are_the_windows_of_the_splits_documents(tmp_path: Path) -> None:
    documents = write_corpus(tmp_path / "c", 80)
    offsets = np.cumsum([0, *map(len, documents)])
    mask = held_out(token_hashes(np.concatenate(documents), offsets), 0.3)
    for split, chosen in (("valid", mask), ("train", ~mask)):
        stream = np.concatenate([document for document, keep in zip(documents, chosen, strict=True) if keep])
        samples = open_set(tmp_path / "c", split=split)
        assert samples.num_tokens == len(stream)
        assert samples.num_documents == chosen.sum()
        assert samples.num_samples == (len(stream) - 1) // 16
        for index in range(2 * samples.num_samples):
            begin = 16 * samples.window(index)
            sample = samples.sample(index)
            assert sample.dtype == np.int64
            assert sample.tolist() == stream[begin : begin + 17].tolist()


def test_train_and_valid_share_no_document(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", 80)
    seen = []
    for split in ("train", "valid"):
        samples = open_set(tmp_path / "c", split=split, seq_length=8)
        seen.append(set(samples.batch(range(samples.num_samples)).ravel().tolist()) - {END})
    assert not seen[0] & seen[1]
    assert min(map(len, seen)) > 20


def test_the_validation_order_is_fixed(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", 80)
    samples = open_set(tmp_path / "c", split="valid", seed=1)
    assert [samples.window(index) for index in range(samples.num_samples)] == list(range(samples.num_samples))
    assert (samples.sample(3) == open_set(tmp_path / "c", split="valid", seed=2).sample(3 + samples.num_samples)).all()


def test_appended_documents_move_no_document_to_the_other_side(tmp_path: Path) -> None:
    write_corpus(tmp_path / "before", 80)
    write_corpus(tmp_path / "after", 80)
    documents = write_corpus(tmp_path / "more", 30, seed=9, begin=100_000)
    write_indexed(tmp_path / "after", [*write_corpus(tmp_path / "before", 80), *documents], np.int32)
    for split in ("train", "valid"):
        before = open_set(tmp_path / "before", split=split, seq_length=1)
        after = open_set(tmp_path / "after", split=split, seq_length=1)
        seen = after.batch(range(after.num_samples))[:, 0]
        old = before.batch(range(before.num_samples))[:, 0]
        assert set(old.tolist()) <= set(seen.tolist())


def test_a_batch_is_its_samples(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", 80)
    samples = open_set(tmp_path / "c")
    indices = [5, 0, samples.num_samples + 2, 5]
    batch = samples.batch(np.array(indices))
    assert batch.shape == (4, 17)
    assert batch.dtype == np.int64
    assert (batch == np.stack([samples.sample(index) for index in indices])).all()
    assert samples.batch([]).shape == (0, 17)


def test_holding_nothing_out_uses_everything(tmp_path: Path) -> None:
    documents = write_corpus(tmp_path / "c", 20)
    assert open_set(tmp_path / "c", holdout=0.0).num_tokens == sum(map(len, documents))
    with pytest.raises(ConfigError, match=r"data\.split=0.0: nothing is held out"):
        open_set(tmp_path / "c", split="valid", holdout=0.0)


def test_too_few_tokens_are_refused_with_the_numbers(tmp_path: Path) -> None:
    write_indexed(tmp_path / "c", [np.arange(10)], np.int32)
    assert open_set(tmp_path / "c", seq_length=9).num_samples == 1
    with pytest.raises(ConfigError, match=r"train\.seq_length=10: a sample needs 11 tokens, the train split .* has 10"):
        open_set(tmp_path / "c", seq_length=10)
    with pytest.raises(ConfigError, match=r"data\.split=0\.3: .* 1 document"):
        open_set(tmp_path / "c", seq_length=4, split="valid")
    with pytest.raises(ConfigError, match=r"train\.seq_length=0"):
        open_set(tmp_path / "c", seq_length=0)


def test_negative_indices_are_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", 20)
    with pytest.raises(ValueError, match="counted from 0"):
        open_set(tmp_path / "c").sample(-1)


def test_hashes_of_another_corpus_are_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", 20)
    np.save(tmp_path / "c.split.npy", np.zeros(19, dtype=np.uint64))
    with pytest.raises(UserError, match=r"c\.split\.npy: .*not the hashes of 20 documents"):
        open_set(tmp_path / "c")


def test_a_prepared_corpus_is_split_by_its_text(prepared: Prepared, config: DataConfig, folder: Path) -> None:
    from megapar.data.tokenizer import open_tokenizer

    tokenizer = open_tokenizer(prepared.tokenizer_path or "")
    texts = {}
    for split in ("train", "valid"):
        samples = open_set(Path(prepared.prefix), split=split, holdout=config.split, seq_length=1)
        tokens = [int(samples.sample(0)[0]), *[int(samples.sample(index)[1]) for index in range(samples.num_samples)]]
        if split == "valid":
            texts[split] = tokenizer.decode(tokens)
            assert samples.char_counts is not None
            assert samples.char_counts[tokens].sum() == len(texts[split])
        assert samples.num_documents > 1
    files = [path.read_text(encoding="utf-8") for path in sorted(folder.iterdir())]
    assert texts["valid"] == "".join(text for text in files if text in texts["valid"])


def test_a_foreign_corpus_counts_no_characters(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", 20)
    assert open_set(tmp_path / "c").char_counts is None
