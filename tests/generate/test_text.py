"""Text as it comes is the text of all tokens, whatever a decoder makes of the first ones."""

from collections.abc import Callable
from pathlib import Path

import pytest

from megapar.config.errors import UserError
from megapar.config.keys import changed
from megapar.config.schema import TrainConfig
from megapar.data.tokenizer import Tokenizer, open_tokenizer
from megapar.data.tokenizer.files import copy_beside
from megapar.generate.text import TextStream, run_tokenizer
from tests.data import hf

TEXT = "alpha beta, naïve 中文 🎉\n  </s> x\u2581y"


def llama2_like(folder: Path) -> Path:
    return hf.llama_like(folder, prepend=True)


def written(tokenizer: Tokenizer, tokens: list[int], before: list[int]) -> list[str]:
    pieces: list[str] = []
    stream = TextStream(tokenizer, pieces.append, before)
    for token in tokens:
        stream.put(token)
        assert not pieces or not pieces[-1].endswith("\ufffd")
    stream.finish()
    return pieces


@pytest.mark.parametrize("make", [hf.gpt2_like, hf.llama_like, llama2_like, hf.bert_like, hf.unigram_like])
def test_the_pieces_are_the_text_of_all_tokens(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    tokenizer = open_tokenizer(make(tmp_path))
    tokens = tokenizer.encode(TEXT)
    pieces = written(tokenizer, tokens, [])
    assert "".join(pieces) == tokenizer.decode(tokens) and len(pieces) > 5
    for cut in range(1, len(tokens), 5):  # and behind a prompt
        before = tokenizer.decode(tokens[:cut])
        if "\ufffd" not in before:
            assert before + "".join(written(tokenizer, tokens[cut:], tokens[:cut])) == tokenizer.decode(tokens)


def test_where_a_run_has_its_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its directory before where `megapar import` put it before beside the token files, which may be gone."""
    monkeypatch.chdir(tmp_path)
    hf.write(tmp_path / "other", {}, {})
    (tmp_path / "other" / "tokenizer.json").rename(tmp_path / "None.tokenizer.json")  # of no run without token files
    run, prefix = tmp_path / "run", tmp_path / "tokens"
    with pytest.raises(
        UserError, match=r"run/tokenizer\.model: missing; put the tokenizer of the run's token files there"
    ):
        run_tokenizer(run, TrainConfig())
    config = changed(TrainConfig(), {"data.prefix": str(prefix)})
    for folder in (tmp_path / "made", run / "hf", run):
        hf.word_like(folder)
        copy_beside(tmp_path / "made" / "tokenizer.json", prefix)
        expected = tmp_path / "tokens.tokenizer.json" if folder.name == "made" else folder / "tokenizer.json"
        assert run_tokenizer(run, config).path == expected


def test_a_word_keeps_its_space_behind_a_prompt(tmp_path: Path) -> None:
    """By themselves the new tokens would lose it."""
    tokenizer = open_tokenizer(llama2_like(tmp_path))
    prompt, new = tokenizer.encode("alpha"), tokenizer.encode("beta")
    assert tokenizer.decode(new) == "beta"
    assert "".join(written(tokenizer, new, prompt)) == " beta"
