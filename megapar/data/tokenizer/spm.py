"""A SentencePiece model with byte fallback: any text in, tokens, the very same text out."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megapar.config.errors import ConfigError
from megapar.cores import num_cores
from megapar.data.tokenizer.contract import PROBE, SPACE_MARK, Tokenizer, check_unicode, encode_around_marks


class SentencePieceTokenizer(Tokenizer):
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
        token: int = self._model.eos_id()
        if token < 0:
            raise ConfigError(
                "data.tokenizer", self.path, "this model has no end-of-sentence token to separate documents"
            )
        return token

    @property
    def mask(self) -> int | None:
        """The token for what is unknown, which byte fallback never writes."""
        token: int = self._model.unk_id()
        return token if token >= 0 else None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        plain = [text for text in texts if SPACE_MARK not in text]
        for text in texts:
            check_unicode(text)
        threads = max(1, min(len(plain), num_cores()))
        encoded: Iterator[list[int]] = iter(self._model.encode(plain, out_type=int, num_threads=threads))
        return [self._encode_marked(text) if SPACE_MARK in text else next(encoded) for text in texts]

    def _encode_marked(self, text: str) -> list[int]:
        mark = [self._byte_tokens[bytes([byte])] for byte in SPACE_MARK.encode()]
        return encode_around_marks(text, lambda part: self._model.encode(part, out_type=int), mark)

    def chat(self, prompt: str, *more: str | Sequence[int]) -> list[int]:
        problem = f"{self.path} is a SentencePiece model, which has no chat template; leave it out"
        raise ConfigError("chat", True, problem)


def _without_space_rules(proto: bytes) -> bytes:
    """The same model without the rules that add a space in front or remove repeated ones."""
    from sentencepiece import sentencepiece_model_pb2

    model: Any = sentencepiece_model_pb2.ModelProto.FromString(proto)  # type: ignore[attr-defined]
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    serialized: bytes = model.SerializeToString()
    return serialized
