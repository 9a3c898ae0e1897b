"""SentencePiece BPE with byte fallback: any text in, tokens, the very same text out."""

import io
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megapar.config.errors import ConfigError, UserError

# SentencePiece writes a space as this character inside pieces, so the character itself has no piece of its own and
# would come back as a space. Where a text contains it, it is spelled in byte tokens.
SPACE_MARK = "\u2581"
# Must survive encode and decode unchanged: a normaliser (NFKC), dropped spaces or a missing byte fallback shows here.
PROBE = "  \ufb01 A\u030a\t\r\n\n \u2460\u3000\U0001f389 \0</s><0x41>" + SPACE_MARK + "  "
# What training does, apart from the vocabulary size. Part of the cache key of prepared corpora.
TRAINER: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "allow_whitespace_only_pieces": True,  # one token for an indentation
    "user_defined_symbols": ["\n"],
    "split_digits": True,
    "required_chars": SPACE_MARK,  # a space has a piece, also where the text has none (DNA, Chinese, a CSV of numbers)
    "character_coverage": 0.9995,  # rarer characters are spelled in bytes
    "unk_id": 0,
    "eos_id": 1,
    "eos_piece": "</s>",
    "bos_id": -1,
    "pad_id": -1,
}
MAX_LINE = 1000  # characters of one training sentence; SentencePiece drops those above 4192 bytes


def train_bpe(texts: Iterable[str], vocab_size: int, model_path: Path) -> None:
    """Train a BPE model on `texts` and write it to `model_path` (temporary file, then rename).

    The same texts and settings give the same file, byte for byte. Raises ConfigError for `data.vocab_size` where the
    texts need more entries than that, or can't fill so many.
    """
    import sentencepiece

    model = io.BytesIO()
    lines = _lines(texts)
    first = next(lines, None)
    if first is None:
        raise ConfigError("data.vocab_size", vocab_size, "there is no text to train a tokenizer on")
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain([first], lines),
            model_writer=model,
            vocab_size=vocab_size,
            num_threads=2,  # a fixed number: it is written into the file
            minloglevel=2,
            **TRAINER,
        )
    except (RuntimeError, OSError) as error:
        raise _training_error(str(error), vocab_size) from None
    temporary = model_path.with_name(f"{model_path.name}.tmp-{os.getpid()}")
    temporary.write_bytes(model.getvalue())
    os.replace(temporary, model_path)


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Non-empty lines, in parts of at most MAX_LINE characters."""
    for text in texts:
        for line in text.split("\n"):
            for begin in range(0, len(line), MAX_LINE):
                yield line[begin : begin + MAX_LINE]


def _training_error(message: str, vocab_size: int) -> UserError:
    """SentencePiece's message, which names the bound but not our key, as one that does both."""
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return ConfigError(
            "data.vocab_size",
            vocab_size,
            f"this text needs at least {found[1]} entries; set data.vocab_size={found[1]} or more",
        )
    if found := re.search(r"too high.*<= (\d+)", message):
        return ConfigError(
            "data.vocab_size",
            vocab_size,
            f"this text yields at most {found[1]} entries; set data.vocab_size={found[1]} or less, or give more text",
        )
    return ConfigError("data.vocab_size", vocab_size, f"SentencePiece could not train on this text: {message}")


class Tokenizer:
    """A SentencePiece model used without loss: `decode(encode(text)) == text` for every text.

    `path` is a `.model` file, ours or another project's. A dummy space before the text or the removal of extra
    spaces is switched off; raises ConfigError for `data.tokenizer` where the file can't be read or the model still
    changes text (a normaliser such as NFKC, no byte fallback), for then bits per character would be wrong.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            proto = self.path.read_bytes()
        except OSError as error:
            raise ConfigError("data.tokenizer", path, f"can't be read: {error.strerror}") from None
        self._load(proto)
        if self._round_trips(PROBE):
            return
        self._load(_without_space_rules(proto))
        if not self._round_trips(PROBE):
            raise ConfigError(
                "data.tokenizer",
                path,
                "this model changes text (normaliser or no byte fallback); give one that is lossless, or bpe",
            )

    def _load(self, proto: bytes) -> None:
        import sentencepiece

        try:
            self._model: Any = sentencepiece.SentencePieceProcessor(model_proto=proto)
        except (RuntimeError, OSError):
            raise ConfigError("data.tokenizer", self.path, "not a SentencePiece model") from None
        self.vocab_size: int = self._model.vocab_size()
        self._bytes = [self._bytes_of(token) for token in range(self.vocab_size)]
        self._byte_tokens = {
            self._bytes[token]: token for token in range(self.vocab_size) if self._model.is_byte(token)
        }

    def _bytes_of(self, token: int) -> bytes:
        """The UTF-8 bytes that a token stands for; none for control tokens."""
        if self._model.is_control(token) or self._model.is_unused(token):
            return b""
        if self._model.is_unknown(token):
            return "\ufffd".encode()
        piece = self._model.id_to_piece(token)
        if self._model.is_byte(token):
            return bytes([int(piece[3:5], 16)])  # <0xE2>
        return piece.replace(SPACE_MARK, " ").encode()

    def _round_trips(self, text: str) -> bool:
        try:
            return self.decode(self.encode(text)) == text
        except KeyError:  # no byte tokens
            return False

    @property
    def end_of_text(self) -> int:
        """Id of the token that closes every document. Raises ConfigError where the model has none."""
        token: int = self._model.eos_id()
        if token < 0:
            raise ConfigError(
                "data.tokenizer", self.path, "this model has no end-of-sentence token to separate documents"
            )
        return token

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without an end-of-text token. Raises UserError for text that is not valid Unicode."""
        return self.encode_batch([text], num_threads=1)[0]

    def encode_batch(self, texts: Sequence[str], *, num_threads: int = 2) -> list[list[int]]:
        """Token ids of each text, as `encode` gives them, on up to `num_threads` threads."""
        plain = [text for text in texts if SPACE_MARK not in text]
        for text in texts:
            check_unicode(text)
        encoded: Iterator[list[int]] = iter(self._model.encode(plain, out_type=int, num_threads=num_threads))
        return [self._encode_marked(text) if SPACE_MARK in text else next(encoded) for text in texts]

    def _encode_marked(self, text: str) -> list[int]:
        """Encode text that contains the space mark: the parts between the marks, and the marks in byte tokens."""
        mark = [self._byte_tokens[bytes([byte])] for byte in SPACE_MARK.encode()]
        tokens: list[int] = []
        for number, part in enumerate(text.split(SPACE_MARK)):
            tokens += mark if number else []
            tokens += self._model.encode(part, out_type=int) if part else []
        return tokens

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids. Control tokens give nothing, bytes that form no character give U+FFFD.

        Raises ValueError for an id outside the vocabulary.
        """
        tokens = [int(token) for token in ids]
        if tokens and not (min(tokens) >= 0 and max(tokens) < self.vocab_size):
            raise ValueError(f"token ids must be in 0..{self.vocab_size - 1}, got {min(tokens)}..{max(tokens)}")
        return b"".join([self._bytes[token] for token in tokens]).decode("utf-8", errors="replace")

    def char_counts(self) -> np.ndarray:
        """Characters that each token stands for, int32 of shape [vocab_size].

        Their sum over `encode(text)` is `len(text)`: of a character in byte tokens, only the lead byte counts.
        """
        return self._char_counts.copy()

    @cached_property
    def _char_counts(self) -> np.ndarray:
        return np.array([sum((byte & 0xC0) != 0x80 for byte in piece) for piece in self._bytes], dtype=np.int32)


def _without_space_rules(proto: bytes) -> bytes:
    """The same model without the rules that add a space in front or remove repeated ones."""
    from sentencepiece import sentencepiece_model_pb2

    model: Any = sentencepiece_model_pb2.ModelProto.FromString(proto)  # type: ignore[attr-defined]
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    serialized: bytes = model.SerializeToString()
    return serialized


def check_unicode(text: str) -> None:
    """Raise UserError for text that is not valid Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"text is not valid Unicode: lone surrogate at character {error.start}; remove it") from None
