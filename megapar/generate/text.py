"""Tokens to text as they come, and the tokenizer of a run."""

import codecs
from collections.abc import Callable, Sequence
from pathlib import Path

from megapar.config.errors import UserError
from megapar.config.schema import TrainConfig
from megapar.data.tokenizer import Tokenizer, open_tokenizer
from megapar.data.tokenizer.files import JSON, MODEL, copy_into, tokenizer_beside, tokenizer_in
from megapar.generate.tokens import Text

IMPORTED = "hf"  # in a run directory: what `megapar import` keeps of the folder that a model came from


class TextStream:
    """Turns tokens into text as they come: a piece is written when its characters are complete.

    The pieces together are `tokenizer.decode` of all tokens, those of `before`, whose text is not written, in front. A
    character may be spelled in several byte tokens. Where the bytes of every token are known, the new ones are decoded
    alone; else the text of a token depends on those before it (a first word loses its space), and each time all are.
    """

    def __init__(self, tokenizer: Tokenizer, write: Callable[[str], object], before: Sequence[int] = ()) -> None:
        self._tokenizer, self._write = tokenizer, write
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace") if tokenizer.piece(0) is not None else None
        self._waiting = ""  # decoded and not written
        self._tokens: list[int] = []
        self._skipped = ""  # of `before`
        if self._bytes is not None:
            for token in before:
                self._decode(token)
        else:
            self._tokens = list(before)
            self._skipped = tokenizer.decode(self._tokens)

    def put(self, token: int) -> None:
        if self._bytes is not None:
            self._waiting += self._decode(token)
            if self._waiting and not self._waiting.endswith("\ufffd"):
                self._emit(self._waiting)
            return
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        if not text.endswith("\ufffd") and text.startswith(self._skipped):
            self._emit(text[len(self._skipped) :])
            self._skipped = text

    def finish(self) -> None:
        """Write what is left, complete or not."""
        if self._bytes is not None:
            self._emit(self._waiting + self._bytes.decode(b"", final=True))
        else:
            self._emit(self._tokenizer.decode(self._tokens)[len(self._skipped) :])

    def _decode(self, token: int) -> str:
        piece = self._tokenizer.piece(token)
        assert self._bytes is not None and piece is not None
        return self._bytes.decode(piece)

    def _emit(self, new: str) -> None:
        self._waiting = ""
        if new:
            self._write(new)


def completion(tokenizer: Tokenizer, text: Text) -> str:
    """What was written behind the prompt, as text."""
    pieces: list[str] = []
    stream = TextStream(tokenizer, pieces.append, text.tokens[: text.prompt])
    for token in text.written:
        stream.put(token)
    stream.finish()
    return "".join(pieces)


def keep_tokenizer(config: TrainConfig) -> None:
    """Copy the tokenizer into the run directory, where `megapar generate` finds it also when the cache is gone.

    Nothing for token files that came without one. Call it on one rank.
    """
    path = tokenizer_beside(config.data.prefix)
    if config.run.dir is not None and path is not None:
        copy_into(path, Path(config.run.dir))


def run_tokenizer(run_dir: Path, config: TrainConfig) -> Tokenizer:
    """The tokenizer of a run: in its directory, of what it was imported with, or beside its token files.

    Raises UserError.
    """
    path = tokenizer_in(run_dir) or tokenizer_in(run_dir / IMPORTED) or tokenizer_beside(config.data.prefix)
    if path is None:
        raise UserError(f"{run_dir / MODEL}: missing; put the tokenizer of the run's token files there, or as {JSON}")
    tokenizer = open_tokenizer(path)
    size = config.model.vocab_size
    if size is not None and tokenizer.vocab_size > size:
        raise UserError(
            f"{path}: has {tokenizer.vocab_size} tokens, the run's model {size}; put the tokenizer of its data there"
        )
    return tokenizer


def prompt_tokens(tokenizer: Tokenizer, prompt: str, chat: bool = False) -> list[int]:
    """What the model continues: the prompt, or the conversation that it begins; of no text, the end of one before.

    Raises UserError.
    """
    return tokenizer.chat(prompt) if chat else tokenizer.encode(prompt) or [tokenizer.end_of_text]
