"""A corpus made with a `tokenizer.json`: nothing depends on where that came from."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from megapar.checkpoint.save import data_hashes
from megapar.config.errors import ConfigError, UserError
from megapar.config.schema import DataConfig
from megapar.data.indexed import IndexedTokens, write_indexed
from megapar.data.manifest import file_record
from megapar.data.prepare import check, prepare
from megapar.data.samples import SampleSet
from megapar.data.tokenizer import Tokenizer, open_tokenizer
from tests.data import hf

BESIDE = [".tokenizer.json", ".tokenizer_config.json"]


def test_the_text_comes_back_without_the_original(config: DataConfig, folder: Path, tmp_path: Path) -> None:
    made = hf.gpt2_like(tmp_path / "hf", chat_template=hf.CHATML)
    (made / "chat_template.jinja").write_text(hf.LLAMA3)
    lines: list[str] = []
    given = dataclasses.replace(config, tokenizer=str(made))
    prepared = prepare(given, log=lines.append)
    assert prepare(dataclasses.replace(given, tokenizer=str(made / "tokenizer.json"))) == prepared  # named as the file
    ends = {".bin", ".idx", ".split.npy", ".chat_template.jinja", *BESIDE}
    assert set(prepared.manifest["files"]) == ends and len(lines) == 2
    shutil.rmtree(made)
    assert prepared.tokenizer_path == Path(f"{prepared.prefix}.tokenizer.json")
    tokenizer = open_tokenizer(prepared.tokenizer_path)
    assert (prepared.vocab_size, prepared.manifest["end_of_text"]) == (tokenizer.vocab_size, tokenizer.end_of_text)
    corpus = IndexedTokens(prepared.prefix)
    for number, path in enumerate(sorted(folder.iterdir())):
        assert corpus.document(number)[-1] == tokenizer.end_of_text
        assert tokenizer.decode(corpus.document(number)) == path.read_text(encoding="utf-8")
    assert len(tokenizer.chat("x")) > 5
    samples = SampleSet(prepared.prefix, split="valid", seq_length=8, seed=0, holdout=0.2)
    assert samples.char_counts is not None and (samples.char_counts == tokenizer.char_counts()).all()
    sha256 = file_record(prepared.tokenizer_path)["sha256"]
    assert data_hashes(prepared.prefix)["tokenizer"] == sha256 == prepared.manifest["tokenizer"]["sha256"]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_another_tokenizer_makes_other_files(config: DataConfig, tmp_path: Path, name: str) -> None:
    given = dataclasses.replace(config, tokenizer=str(hf.gpt2_like(tmp_path / "hf")))
    first = prepare(given)
    with open(tmp_path / "hf" / name, "a") as file:
        file.write("{}" if name == "special_tokens_map.json" else "\n")
    assert prepare(given).prefix != first.prefix


def test_one_that_changes_text_says_so_once(config: DataConfig, tmp_path: Path) -> None:
    lines: list[str] = []
    given = dataclasses.replace(config, tokenizer=str(hf.bert_like(tmp_path / "hf")))
    prepared = prepare(given, log=lines.append)
    said = [line for line in lines if "bits per character" in line]
    assert said == ["data: text: tokenizer.json changes text on its way in, so no bits per character can be given"]
    assert SampleSet(prepared.prefix, split="valid", seq_length=8, seed=0, holdout=0.2).char_counts is None


def test_a_place_of_the_users_own_has_one_tokenizer(config: DataConfig, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Made anew with the other kind, the files of the first are gone."""
    prefix, found = str(tmp_path / "own" / "c"), []
    made = hf.gpt2_like(tmp_path / "hf")
    for given in (made, tokenizer.path, made):
        prepared = prepare(dataclasses.replace(config, tokenizer=str(given)), prefix=prefix)
        check(prefix, "full")
        ends = {path.name[1:] for path in (tmp_path / "own").iterdir()}
        found.append(ends - {".bin", ".idx", ".json", ".split.npy"})
        assert prepared.tokenizer_path is not None and prepared.tokenizer_path.exists()
    assert found == [set(BESIDE), {".model"}, set(BESIDE)]


@pytest.mark.parametrize("writable", [True, False])
def test_one_that_lies_beside_token_files(writable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of token files without a manifest it is theirs, if it can be."""
    (tmp_path / "in").mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) if writable or mode != os.W_OK else False)
    entries = open_tokenizer(hf.gpt2_like(tmp_path / "hf")).vocab_size
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "hf" / name, tmp_path / "in" / f"c.{name}")
    config = DataConfig(path=str(tmp_path / "in" / "c"), cache=str(tmp_path / "cache"))
    write_indexed(tmp_path / "in" / "c", [np.array([1, entries])], np.dtype("<u2"))
    with pytest.raises(UserError, match=rf"json: a tokenizer of {entries} entries, and .* has token {entries}"):
        prepare(config)
    write_indexed(tmp_path / "in" / "c", [np.array([1, entries - 1])], np.dtype("<u2"))
    prepared = prepare(config)
    assert prepared.tokenizer_path is not None and open_tokenizer(prepared.tokenizer_path).end_of_text == 1


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (
            "missing",
            r"data\.tokenizer=missing: must be bpe or the path of a SentencePiece \.model, a tokenizer",
        ),
        ("empty", r"data\.tokenizer=empty: this folder has no tokenizer\.json and no tokenizer\.model; name a folder"),
        ("broken", r"data\.tokenizer=broken/tokenizer\.json: broken JSON"),
        ("endless", r"data\.tokenizer=endless/tokenizer\.json: nothing beside it names the token that separates"),
    ],
)
def test_what_is_no_tokenizer_is_refused_and_leaves_nothing(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, problem: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (hf.gpt2_like(tmp_path / "broken") / "tokenizer.json").write_text(json.dumps({"model": {}})[:-1])
    hf.gpt2_like(tmp_path / "endless", eos_token=None)
    lines: list[str] = []
    with pytest.raises(ConfigError, match=problem):
        prepare(dataclasses.replace(config, tokenizer=given), log=lines.append)
    assert not lines  # before the text was read
    assert not Path(config.cache or "").exists() or list(Path(config.cache or "").iterdir()) == []
