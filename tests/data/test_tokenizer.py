"""The tokenizer loses nothing, counts characters exactly and trains the same model twice."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megapar.config.errors import ConfigError, UserError
from megapar.data.tokenizer import SPACE_MARK, Tokenizer, train_bpe
from tests.data.texts import make_text

# Text that SentencePiece treats in a way of its own, mixed with any text at all.
TRAPS = [
    SPACE_MARK,
    "\u2585",
    "<s>",
    "</s>",
    "<unk>",
    "<0x41>",
    "<0xE2>",
    "\0",
    "\r\n",
    "\t",
    "  ",
    "\n\n",
    "\ufeff",
    "🎉",
    "\u2028",
]
ANY_TEXT = st.lists(st.one_of(st.text(), st.sampled_from(TRAPS))).map("".join)


@settings(max_examples=400, deadline=None)
@given(ANY_TEXT)
@example(f" {SPACE_MARK} a{SPACE_MARK}{SPACE_MARK}  b ")
@example("a\0b\0")
@example("\ufffd \U0010ffff e\u0301 \ufb01 \u3000")
def test_any_text_comes_back_and_its_characters_are_counted(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.char_counts()[ids].sum() == len(text)
    assert tokenizer.end_of_text not in ids


@settings(max_examples=30, deadline=None)
@given(st.lists(ANY_TEXT, max_size=6))
def test_a_batch_is_its_texts_one_by_one(tokenizer: Tokenizer, texts: list[str]) -> None:
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_char_counts_of_each_kind_of_token(tokenizer: Tokenizer) -> None:
    counts = tokenizer.char_counts()
    assert counts.shape == (tokenizer.vocab_size,)
    assert counts.dtype == np.int32
    assert counts[tokenizer.end_of_text] == 0
    assert counts[tokenizer.encode("🎉")].tolist() == [1, 0, 0, 0]
    assert counts.max() > 3  # indentation and words


def test_control_tokens_are_not_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([tokenizer.end_of_text]) == ""
    assert tokenizer.decode([*tokenizer.encode("ab"), tokenizer.end_of_text, *tokenizer.encode(" c")]) == "ab c"


def test_bytes_that_form_no_character_are_marked(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("🎉")[:2] + tokenizer.encode("a")) == "\ufffda"


@pytest.mark.parametrize("ids", [[-1], [0, 10_000]])
def test_ids_outside_the_vocabulary_are_refused(tokenizer: Tokenizer, ids: list[int]) -> None:
    with pytest.raises(ValueError, match="token ids must be in"):
        tokenizer.decode(ids)


@pytest.mark.parametrize("text", ["ab\ud800", f"{SPACE_MARK}b\ud800"])
def test_a_lone_surrogate_is_refused_with_its_place(tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(UserError, match="lone surrogate at character 2"):
        tokenizer.encode(text)


def _random_lines(alphabet: str, *, width: int = 60, lines: int = 200) -> str:
    rng = np.random.default_rng(len(alphabet))
    letters = np.array(list(alphabet))
    return "\n".join("".join(letters[rng.integers(0, len(letters), width)]) for _ in range(lines)) + "\n"


# Scripts and formats, most of them without a single space.
WITHOUT_SPACES = {
    "DNA": _random_lines("ACGT"),
    "protein": _random_lines("ACDEFGHIKLMNPQRSTVWY"),
    "Chinese": _random_lines("天地玄黃宇宙洪荒日月盈昃辰宿列張。，"),
    "Japanese": _random_lines("いろはにほへとちりぬるをカタカナ漢字、。"),
    "Thai": _random_lines("กขคงจฉชซญดตถทนบปผฝพฟมยรลวสหอ" + "ะาิีุู่้"),
    "Khmer": _random_lines("កខគឃងចឆជឈញដឋ" + "ាិីុូ្"),
    "CSV of numbers": "\n".join(f"{n},{n * n},{n / 7:.3f},-{n}" for n in range(300)),
    "base64": _random_lines("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/", width=76),
    "JSON lines": "\n".join(f'{{"id":{n},"tags":["a{n % 7}","b"],"v":null}}' for n in range(300)),
    "tabs and CRLF": "".join(f"row{n}\t{n % 9}\tx\r\n" for n in range(300)),
    "URLs": "\n".join(f"https://example.org/{n % 13}/index.html?q={n}#top" for n in range(300)),
    "emoji": _random_lines("🎉🙂👩\u200d🔬🏳\ufe0f"),
    "Arabic": _random_lines("ابتثجحخدذرزسشصضطظعغفقكلمنهوي") + "مع مسافات\n",
    "Hindi": _random_lines("कखगघचछजझटठडढतथदधनपफबभमयरलवशषसह" + "ािीुूे्"),
}


@pytest.mark.parametrize("name", WITHOUT_SPACES)
def test_any_text_round_trips_with_the_tokenizer_trained_on_it(tmp_path: Path, name: str) -> None:
    text = WITHOUT_SPACES[name]
    train_bpe([text], 260 + len(set(text)), tmp_path / "t.model")
    tokenizer = Tokenizer(tmp_path / "t.model")
    for other in (text, "a b  c\n", *TRAPS, *WITHOUT_SPACES.values()):
        assert tokenizer.decode(tokenizer.encode(other)) == other
    assert len(tokenizer.encode(text)) < len(text.encode())


@pytest.mark.parametrize("text", ["aaaa\n" * 50, SPACE_MARK * 40, "7\n" * 9])
def test_text_of_one_character_trains_a_tokenizer(tmp_path: Path, text: str) -> None:
    train_bpe([text], 261, tmp_path / "t.model")
    tokenizer = Tokenizer(tmp_path / "t.model")
    assert tokenizer.decode(tokenizer.encode(text + " b")) == text + " b"


def test_training_twice_gives_the_same_file(tmp_path: Path) -> None:
    for name in "ab":
        train_bpe((make_text(seed) for seed in range(5)), 330, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_too_small_a_vocabulary_names_the_least(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.vocab_size=100: .*at least (\d+) entries") as caught:
        train_bpe([make_text(0)], 100, tmp_path / "m")
    least = int(str(caught.value).split("at least ")[1].split()[0])
    train_bpe([make_text(0)], least, tmp_path / "m")
    assert Tokenizer(tmp_path / "m").vocab_size == least


def test_too_large_a_vocabulary_names_the_most(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.vocab_size=5000: .*at most (\d+) entries") as caught:
        train_bpe([make_text(0)], 5000, tmp_path / "m")
    most = int(str(caught.value).split("at most ")[1].split()[0])
    train_bpe([make_text(0)], most, tmp_path / "m")
    assert Tokenizer(tmp_path / "m").vocab_size == most


@pytest.mark.parametrize("texts", [[], ["", "\n\n"]])
def test_no_text_to_train_on(tmp_path: Path, texts: list[str]) -> None:
    with pytest.raises(ConfigError, match="no text"):
        train_bpe(texts, 300, tmp_path / "m")


def foreign_model(path: Path, **changes: object) -> Path:
    """A model as other projects train them."""
    import io

    import sentencepiece

    model = io.BytesIO()
    options: dict[str, Any] = {
        "normalization_rule_name": "identity",
        "byte_fallback": True,
        "vocab_size": 350,
    } | changes
    lines = iter([line for seed in range(5) for line in make_text(seed).split("\n")])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, model_type="bpe", minloglevel=2, **options
    )
    path.write_bytes(model.getvalue())
    return path


def test_a_foreign_model_with_a_dummy_space_is_used_without_it(tmp_path: Path) -> None:
    tokenizer = Tokenizer(foreign_model(tmp_path / "m", add_dummy_prefix=True, remove_extra_whitespaces=True))
    for text in ("x", "  x  y ", "\n\tdef f():\r\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.char_counts()[tokenizer.encode(text)].sum() == len(text)


@pytest.mark.parametrize(
    "change", [{"normalization_rule_name": "nmt_nfkc"}, {"byte_fallback": False, "vocab_size": 120}]
)
def test_a_model_that_changes_text_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"data\.tokenizer=.*changes text"):
        Tokenizer(foreign_model(tmp_path / "m", **change))


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(b"not a model")
    for name in ("m", "missing"):
        with pytest.raises(ConfigError, match=r"data\.tokenizer="):
            Tokenizer(tmp_path / name)
