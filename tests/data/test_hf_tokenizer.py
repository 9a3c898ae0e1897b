"""`tokenizer.json`: nothing is lost where that can be, text makes no control tokens, and every fault is one line."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given, settings

from megapar.config.errors import ConfigError, UserError
from megapar.data.tokenizer import Tokenizer, open_tokenizer
from megapar.data.tokenizer.contract import SPACE_MARK
from megapar.data.tokenizer.pieces import BYTE_OF_CHARACTER
from tests.data import hf
from tests.data.texts import ANY_TEXT, TRAPS, WITHOUT_SPACES, assert_nothing_lost

LOSSLESS = {"byte-level": hf.gpt2_like, "byte fallback": hf.llama_like}
KINDS: dict[str, Callable[..., Path]] = {**LOSSLESS, "Unigram": hf.unigram_like, "WordPiece": hf.bert_like}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    root = tmp_path_factory.mktemp("hf")
    return {name: open_tokenizer(make(root / name)) for name, make in KINDS.items()}


@pytest.mark.parametrize("name", LOSSLESS)
def test_any_script_and_format_comes_back_and_its_characters_are_counted(made: dict[str, Tokenizer], name: str) -> None:
    for text in (*WITHOUT_SPACES.values(), *TRAPS, "".join(hf.CONTROLS), f"  {hf.TOOL}  a", ""):
        assert_nothing_lost(made[name], text)
    texts = [*TRAPS, "a  b"]
    assert made[name].encode_batch(texts) == [made[name].encode(text) for text in texts]


@pytest.mark.parametrize("name", LOSSLESS)
@settings(max_examples=150, deadline=None)
@given(ANY_TEXT)
@example(f" {SPACE_MARK} a{SPACE_MARK}{SPACE_MARK}  b ")
@example("\ufffd \U0010ffff e\u0301 \ufb01 \u3000")
def test_any_text_comes_back(made: dict[str, Tokenizer], name: str, text: str) -> None:
    assert_nothing_lost(made[name], text)


@pytest.mark.parametrize("name", KINDS)
def test_text_that_spells_a_control_token_is_text(made: dict[str, Tokenizer], name: str) -> None:
    """The library alone would make one of it, and so would the vocabulary of a Unigram model."""
    folder = made[name].path
    spec = json.loads(folder.read_text(encoding="utf-8"))
    special = {token["content"]: token["id"] for token in spec["added_tokens"] if token["special"]}
    plain, as_text = (tokenizers.Tokenizer.from_file(str(folder)) for _ in range(2))
    as_text.encode_special_tokens = True
    for content, token in special.items():
        text = f"a {content} {content}{content}b"
        assert token in plain.encode(text, add_special_tokens=False).ids
        ids = made[name].encode(text)
        controls = set(special.values()) - {special.get("<unk>"), special.get("[UNK]")}
        assert controls.isdisjoint(ids) and len(ids) > 3
        if name in LOSSLESS:  # cut nowhere
            assert ids == as_text.encode(text, add_special_tokens=False).ids


def test_controls_are_also_what_the_files_beside_name(tmp_path: Path) -> None:
    """An added token that is not special becomes one as eos_token, and of one character it can't be spelled."""
    folder = hf.gpt2_like(tmp_path, eos_token=hf.TOOL)
    tokenizer = open_tokenizer(folder)
    assert_nothing_lost(tokenizer, f"a{hf.TOOL}b")
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.end_of_text, *tokenizer.encode(" b")]) == "a b"
    hf.unigram_like(tmp_path / "u", bos_token="a")
    with pytest.raises(UserError, match="text with 'a' can't be told from that control token"):
        open_tokenizer(tmp_path / "u").encode("bab")


@pytest.mark.parametrize("name", KINDS)
def test_nothing_is_cut_padded_or_put_around(made: dict[str, Tokenizer], name: str) -> None:
    tokenizer = made[name]
    assert tokenizer.encode("") == []
    assert len(tokenizer.encode("alpha beta " * 30)) >= 60
    assert tokenizer.encode_batch(["alpha", "alpha beta"])[0] == tokenizer.encode("alpha")


def test_dropout_is_off(tmp_path: Path) -> None:
    folder = hf.gpt2_like(tmp_path)
    plain = open_tokenizer(folder).encode("alpha beta gamma tensor")
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    hf.edit(folder, model=spec["model"] | {"dropout": 0.9})
    assert open_tokenizer(folder).encode("alpha beta gamma tensor") == plain


def test_the_characters_of_bytes_are_the_librarys() -> None:
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    assert set(BYTE_OF_CHARACTER) == set(alphabet) and sorted(BYTE_OF_CHARACTER.values()) == list(range(256))
    split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in ("é中🎉\n\x7f\xad", "".join(map(chr, range(0x180)))):
        written = "".join(piece for piece, _ in split.pre_tokenize_str(text))
        assert bytes(BYTE_OF_CHARACTER[character] for character in written) == text.encode()


def nfc(spec: dict[str, Any]) -> None:
    spec["normalizer"] = {"type": "NFC"}


def space_in_front(spec: dict[str, Any]) -> None:
    spec["pre_tokenizer"]["add_prefix_space"] = True


def letters_removed(spec: dict[str, Any]) -> None:
    split = {"type": "Split", "pattern": {"String": "\x01"}, "behavior": "Removed", "invert": False}
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, spec["pre_tokenizer"]]}


def a_byte_missing(spec: dict[str, Any]) -> None:
    """One that no probe is made of: its token is now called otherwise."""
    vocabulary = spec["model"]["vocab"]
    vocabulary["never"] = vocabulary.pop(next(key for key, byte in BYTE_OF_CHARACTER.items() if byte == 0x07))


def added_spaces(spec: dict[str, Any]) -> None:
    spec["added_tokens"][-1]["rstrip"] = True


def added_bytes(spec: dict[str, Any]) -> None:
    """A text whose token also stands for a single byte."""
    added = {**spec["added_tokens"][-1], "id": spec["model"]["vocab"]["é"], "content": "é"}
    spec["added_tokens"].append(added)


@pytest.mark.parametrize("change", [nfc, space_in_front, letters_removed, a_byte_missing, added_spaces, added_bytes])
def test_what_changes_text_counts_no_characters(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    folder = hf.gpt2_like(tmp_path)
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert open_tokenizer(folder).char_counts() is not None
    change(spec)
    hf.edit(folder, **spec)
    tokenizer = open_tokenizer(folder)
    assert tokenizer.char_counts() is None
    assert tokenizer.decode(tokenizer.encode("alpha beta")).strip() == "alpha beta"


def test_what_words_lose_is_lost_as_the_library_does(made: dict[str, Tokenizer], tmp_path: Path) -> None:
    prepends = open_tokenizer(hf.llama_like(tmp_path / "llama", prepend=True))
    assert prepends.char_counts() is None and prepends.decode(prepends.encode("alpha  beta")) == "alpha  beta"
    bert = made["WordPiece"]
    assert bert.char_counts() is None
    ids = [2, *bert.encode("Alpha GRADIENT \u2460"), 3, 0]
    assert bert.decode(ids) == "alpha gradient [UNK]"
    plain = tokenizers.Tokenizer.from_file(str(bert.path))
    assert bert.decode(ids) == plain.decode(ids[1:-2], skip_special_tokens=False)


@pytest.mark.parametrize(
    ("files", "token"),
    [
        ({"tokenizer_config.json": {"eos_token": "</s>"}}, 1),
        ({"tokenizer_config.json": {"eos_token": {"content": "<|im_end|>", "lstrip": False}, "sep_token": "<s>"}}, 3),
        ({"tokenizer_config.json": {"eos_token": None, "sep_token": "<|im_end|>"}}, 3),
        ({"special_tokens_map.json": {"eos_token": "<|im_end|>"}}, 3),
        ({"special_tokens_map.json": {"eos_token": "<s>"}, "tokenizer_config.json": {"eos_token": "</s>"}}, 1),
    ],
)
def test_the_end_of_text(tmp_path: Path, files: dict[str, Any], token: int) -> None:
    (hf.gpt2_like(tmp_path) / "tokenizer_config.json").unlink()
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert open_tokenizer(tmp_path).end_of_text == token


def test_no_end_of_text_is_refused_when_it_is_needed(tmp_path: Path) -> None:
    (hf.gpt2_like(tmp_path) / "tokenizer_config.json").unlink()
    tokenizer = open_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("alpha")) == "alpha"
    with pytest.raises(ConfigError, match=r'nothing beside it .* write tokenizer_config\.json with \{"eos'):
        _ = tokenizer.end_of_text
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    with pytest.raises(ConfigError, match=r"has no '<eos>', which is the eos_token beside it"):
        _ = open_tokenizer(tmp_path).end_of_text


def test_ids_and_texts_out_of_range(made: dict[str, Tokenizer]) -> None:
    for tokenizer in made.values():
        for ids in ([-1], [0, tokenizer.vocab_size]):
            with pytest.raises(ValueError, match="token ids must be in"):
                tokenizer.decode(ids)
        with pytest.raises(UserError, match="lone surrogate at character 1"):
            tokenizer.encode("a\ud800")


def test_a_folder_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf.gpt2_like(tmp_path / "both")
    (tmp_path / "both" / "tokenizer.json").rename(tmp_path / "both" / "mine.json")
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("~/both/mine.json", tmp_path / "both" / "mine.json"):
        assert open_tokenizer(path).end_of_text == 1
    with pytest.raises(ConfigError, match=r"data\.tokenizer=.*both: this folder has no tokenizer\.json and no "):
        open_tokenizer(tmp_path / "both")


def test_a_library_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hf.gpt2_like(tmp_path, chat_template="x")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "jinja2", None)
        with pytest.raises(UserError, match=r"^the library jinja2, .*pip install 'megapar\[hf\]'"):
            open_tokenizer(folder).chat("a")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r"tokenizer\.json: the library tokenizers, .*pip install 'megapar\[hf\]'"):
        open_tokenizer(folder)


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        (
            "tokenizer.json",
            '{"model": ',
            r"tokenizer\.json: broken JSON \(.*line 1 column \d+.*\); fetch",
        ),
        ("tokenizer.json", "[1]", r"tokenizer\.json: not a JSON object"),
        ("tokenizer.json", '{"added_tokens": []}', r'tokenizer\.json: no tokenizer \("model" is missing\); give'),
        (
            "tokenizer.json",
            '{"model": {"type": "Mamba", "vocab": {}}}',
            r"tokenizers [0-9.]+ can't read it \(.*\);",
        ),
        (
            "tokenizer.json",
            '{"model": {"type": "BPE", "vocab": {}, "merges": []}}',
            r"read it \(it has no tokens\)",
        ),
        ("tokenizer.json", '{"model": {}, "added_tokens": [1]}', r'"added_tokens" is no list of tokens'),
        ("tokenizer_config.json", "\xff", r"tokenizer_config\.json: broken JSON"),
        ("special_tokens_map.json", "", r"special_tokens_map\.json: broken JSON"),
    ],
)
def test_a_broken_file_is_refused_by_its_name(tmp_path: Path, name: str, text: str, problem: str) -> None:
    hf.gpt2_like(tmp_path)
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=rf"data\.tokenizer=.*{problem}") as caught:
        open_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
