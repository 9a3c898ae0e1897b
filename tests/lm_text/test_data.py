"""The shipped plays as documents, one of them held out; any other text is what it is to `tokens`."""

import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megapar.cli.compose import compose, split
from megapar.config.errors import UserError
from megapar.config.schema import DataConfig
from megapar.data.indexed import IndexedTokens
from megapar.data.source import find_source
from megapar.data.sources.tokens import SOURCE as TOKENS
from megapar.data.split import held_out, load_hashes
from megapar.data.tokenizer import open_tokenizer

LM_TEXT = find_source("lm_text")
ARCHIVE = Path(__file__).parents[2] / "experiments" / "lm_text" / "plays.tar.xz"
PLAYS = compose("train", split(["experiment=lm_text"])).data


def test_whole_plays_are_held_out(cache: Path) -> None:
    prepared = LM_TEXT.prepare(replace(PLAYS, cache=str(cache)), print)
    tokens, tokenizer = IndexedTokens(prepared.prefix), open_tokenizer(f"{prepared.prefix}.model")
    texts = [tokenizer.decode(tokens.document(number)) for number in range(tokens.num_documents)]
    with tarfile.open(ARCHIVE) as files:
        plays = [file.read().decode() for member in files if (file := files.extractfile(member))]
    assert texts == plays and len(plays) == 8
    hashes = load_hashes(prepared.prefix, 8)
    assert hashes is not None
    mask = held_out(hashes, PLAYS.split)
    [held] = [text for text, out in zip(texts, mask, strict=True) if out]
    assert held.startswith("MUCH ADO ABOUT NOTHING")
    assert 0.1 < len(held) / sum(map(len, texts)) < 0.15


def test_prepared_once(cache: Path) -> None:
    config = replace(PLAYS, cache=str(cache))
    first = LM_TEXT.prepare(config, print)
    times = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    assert LM_TEXT.prepare(config, print) == first
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == times


def test_any_folder(cache: Path, tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text("".join(draw.choice(list("abcde \n"), 500)))
    config = DataConfig(path=str(tmp_path), source="lm_text", vocab_size=320, cache=str(cache))
    assert LM_TEXT.prepare(config, print) == TOKENS.prepare(config, print)


def test_half_an_archive_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(UserError, match=r"cache: can't be written \(No space left on device\); make room"):
            LM_TEXT.prepare(replace(PLAYS, cache=str(tmp_path / "cache")), print)
    assert not list((tmp_path / "cache").iterdir())


def test_a_folder_of_that_name_is_not_taken_silently(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plays").mkdir()
    said: list[str] = []
    LM_TEXT.prepare(replace(PLAYS, cache=str(cache)), said.append)
    assert said == ["data: plays is the text that comes with lm_text; data.path=./plays is what lies here by that name"]
