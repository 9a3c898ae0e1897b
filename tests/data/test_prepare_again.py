"""Preparing again: after an interruption, of token files of others that have changed, of names with two meanings."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megapar.config.errors import ConfigError, UserError
from megapar.config.schema import DataConfig
from megapar.data.indexed import IndexedTokens, write_indexed
from megapar.data.prepare import check, prepare
from megapar.data.samples import SampleSet
from megapar.data.tokenizer import Tokenizer
from megapar.data.tokenizer.spm import SentencePieceTokenizer
from tests.data.test_prepare import with_changes
from tests.data.texts import make_text


def interrupt_after(batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the tokenizer is at the next batch."""
    plain, count = SentencePieceTokenizer.encode_batch, iter(range(1000))

    def encode_batch(self: SentencePieceTokenizer, texts: Any) -> Any:
        if next(count) == batches:
            raise KeyboardInterrupt
        return plain(self, texts)

    monkeypatch.setattr(SentencePieceTokenizer, "encode_batch", encode_batch)


@pytest.mark.parametrize("out", [False, True])
def test_an_interrupted_preparation_goes_on(
    out: bool, config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer is trained once, no document is tokenized twice, and the files are those of an unbroken call."""
    monkeypatch.setattr("megapar.data.tokenise.BATCH_CHARS", 2000)
    whole = prepare(with_changes(config, cache=str(tmp_path / "whole")))
    prefix = str(tmp_path / "made" / "c") if out else None
    lines: list[str] = []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("megapar.data.tokenise.SAY_S", -1.0)
        interrupt_after(4, patch)  # the first is the probe's
        prepare(config, prefix=prefix, log=lines.append)
    assert any("tokenized " in line for line in lines)
    assert "interrupted after " in lines[-1] and lines[-1].endswith("; the same command goes on from there")
    done = lines[-1].partition("interrupted after ")[2].partition(";")[0]
    assert not done.startswith("0%")
    monkeypatch.setattr("megapar.data.tokenise.make_tokenizer", lambda *given: pytest.fail("trained again"))
    later: list[str] = []
    prepared = prepare(config, prefix=prefix, log=later.append)
    assert f"data: {folder_name(config)}: goes on after {done}" in later
    for end in (".bin", ".idx", ".model", ".split.npy"):
        assert Path(f"{prepared.prefix}{end}").read_bytes() == Path(f"{whole.prefix}{end}").read_bytes()
    place = Path(prepared.prefix).parent
    assert not [name for name in os.listdir(place if out else place.parent) if "unfinished" in name]
    assert not any(name.endswith((".lengths", ".lock")) for name in os.listdir(place))


def folder_name(config: DataConfig) -> str:
    return Path(config.path).name


def test_unfinished_work_on_what_has_changed_is_removed(
    config: DataConfig, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megapar.data.tokenise.BATCH_CHARS", 2000)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(4, patch)
        prepare(config)
    assert len(os.listdir(str(config.cache))) == 1
    (folder / "new.txt").write_text(make_text(99))
    assert prepare(config).documents == 41
    assert [name for name in os.listdir(str(config.cache)) if name.startswith(".")] == []


def foreign_corpus(prefix: Path) -> DataConfig:
    rng = np.random.default_rng(0)
    prefix.parent.mkdir(exist_ok=True)
    write_indexed(prefix, [rng.integers(0, 70_000, size=50) for _ in range(30)], np.int32)
    return DataConfig(path=str(prefix), cache=str(prefix.parent.parent / "cache"))


def test_a_foreign_corpus_gets_a_manifest_beside_it(tmp_path: Path) -> None:
    config = foreign_corpus(tmp_path / "in" / "c")
    lines: list[str] = []
    prepared = prepare(config, log=lines.append)
    assert (prepared.prefix, prepared.vocab_size, prepared.tokenizer_path) == (str(tmp_path / "in" / "c"), None, None)
    assert prepared.max_token == IndexedTokens(prepared.prefix).tokens.max()
    assert (prepared.tokens, prepared.documents) == (1500, 30)
    assert prepare(config, log=lines.append) == prepared
    assert len(lines) == 1
    check(prepared.prefix, "full")
    assert SampleSet(prepared.prefix, split="valid", seq_length=8, seed=0, holdout=0.3).num_samples > 0


def test_a_foreign_corpus_in_a_read_only_folder_is_described_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flip: Callable[[str, int], None]
) -> None:
    config = foreign_corpus(tmp_path / "in" / "c")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    prepared = prepare(config)
    assert sorted(os.listdir(tmp_path / "in")) == ["c.bin", "c.idx"]
    assert prepare(config) == prepared
    check(prepared.prefix, "full")
    before = os.stat(tmp_path / "in" / "c.bin")
    flip(str(tmp_path / "in" / "c.bin"), 4)
    os.utime(tmp_path / "in" / "c.bin", ns=(before.st_atime_ns, before.st_mtime_ns))  # as a disk loses a bit
    with pytest.raises(UserError, match=r"tokens\.bin: offset 0"):
        check(prepare(config).prefix)


@pytest.mark.parametrize("writable", [True, False])
def test_a_foreign_corpus_made_anew_is_described_anew(
    writable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = foreign_corpus(tmp_path / "in" / "c")
    monkeypatch.setattr(os, "access", lambda path, mode: writable)
    first = prepare(config)
    rng = np.random.default_rng(1)
    write_indexed(tmp_path / "in" / "c", [rng.integers(0, 70_000, size=50) for _ in range(30)], np.int32)
    lines: list[str] = []
    second = prepare(config, log=lines.append)
    check(second.prefix, "full")
    assert second.max_token != first.max_token and any("reading them once" in line for line in lines)
    assert prepare(config, log=lines.append) == second


@pytest.mark.parametrize("writable", [True, False])
def test_a_tokenizer_that_does_not_fit_its_token_files_is_refused(
    writable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer
) -> None:
    """Whether it lies there from the first or comes later."""
    config = foreign_corpus(tmp_path / "in" / "c")
    monkeypatch.setattr(os, "access", lambda path, mode: writable)
    prepare(config)
    shutil.copy(tokenizer.path, tmp_path / "in" / "c.model")
    with pytest.raises(UserError, match=r"(c|tokens)\.model: a tokenizer of \d+ entries, and .*\.bin has token \d+"):
        prepare(config)
    write_indexed(tmp_path / "in" / "c", [np.arange(50)] * 30, np.int32)
    assert prepare(config).tokenizer_path is not None


def test_a_tokenizer_that_the_manifest_does_not_name_is_not_believed(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prepared = prepare(foreign_corpus(tmp_path / "in" / "c"))
    shutil.copy(tokenizer.path, f"{prepared.prefix}.model")
    assert SampleSet(prepared.prefix, split="valid", seq_length=8, seed=0, holdout=0.3).char_counts is None


def test_a_name_with_two_meanings_is_refused_with_both(config: DataConfig, folder: Path) -> None:
    """A folder, then a file, beside token files of its name."""
    prefix = str(folder)
    prepare(config, prefix=prefix)
    (folder / "another.txt").write_text(make_text(99))
    with pytest.raises(
        ConfigError, match=r"a folder .*/ and token files .*\.bin; write data\.path=.*/ or data\.prefix="
    ):
        prepare(config)
    assert prepare(with_changes(config, path=f"{prefix}/")).documents == 41
    assert prepare(with_changes(config, prefix=prefix)).documents == 40
    assert prepare(config, prefix=prefix).documents == 41  # to be written there: the text, and no other
    shutil.rmtree(folder)
    assert prepare(config).documents == 41
    folder.write_text(make_text(5))
    with pytest.raises(ConfigError, match=r"a file .* and token files .*\.bin; write data\.prefix="):
        prepare(config)


def test_stdlib_is_a_word(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And never what lies in the folder by that name; a line says how to name that."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("megapar.data.prepare.find_text", lambda path: pytest.fail(f"text of {path}"))
    (tmp_path / "stdlib").mkdir()
    write_indexed(tmp_path / "stdlib", [np.arange(9)], np.int32)
    lines: list[str] = []
    with pytest.raises(pytest.fail.Exception, match="text of stdlib"):
        prepare(with_changes(config, path="stdlib"), log=lines.append)
    assert lines == [
        "data: stdlib is Python's standard library; write data.path=./stdlib for what lies here by that name"
    ]
    with pytest.raises(ConfigError, match=r"data\.path=\./stdlib: there are a folder"):
        prepare(with_changes(config, path="./stdlib"))


def test_a_foreign_corpus_with_a_negative_id_is_refused(tmp_path: Path) -> None:
    write_indexed(tmp_path / "c", [np.array([3, 4]), np.array([5, -1, 2])], np.int32)
    with pytest.raises(UserError, match=r"c\.bin: offset 12: token id -1"):
        prepare(DataConfig(path=str(tmp_path / "c")))
