"""Tokens to text as they come, and the tokenizer of a run."""

import shutil
from collections.abc import Callable
from pathlib import Path

from megapar.config.errors import UserError
from megapar.config.schema import TrainConfig
from megapar.data.tokenizer import Tokenizer

TOKENIZER = "tokenizer.model"  # in the run directory


class TextStream:
    """Turns tokens into text as they come: a piece is written when its characters are complete.

    The pieces together are `tokenizer.decode` of all tokens. A character may be spelled in several byte tokens.
    """

    def __init__(self, tokenizer: Tokenizer, write: Callable[[str], object]) -> None:
        self._tokenizer, self._write = tokenizer, write
        self._pending: list[int] = []

    def put(self, token: int) -> None:
        self._pending.append(token)
        text = self._tokenizer.decode(self._pending)
        if not text.endswith("\ufffd"):
            self._emit(text)

    def finish(self) -> None:
        """Write what is left, complete or not."""
        self._emit(self._tokenizer.decode(self._pending))

    def _emit(self, text: str) -> None:
        self._pending = []
        if text:
            self._write(text)


def keep_tokenizer(config: TrainConfig) -> None:
    """Copy the tokenizer into the run directory, where `megapar generate` finds it also when the cache is gone.

    Nothing for token files that came without one. Call it on one rank.
    """
    model = Path(f"{config.data.prefix}.model")
    if config.run.dir is not None and model.exists():
        shutil.copyfile(model, Path(config.run.dir) / TOKENIZER)


def run_tokenizer(run_dir: Path, config: TrainConfig) -> Tokenizer:
    """The tokenizer of a run: the copy in its directory, else the one beside the token files. Raises UserError."""
    places = [run_dir / TOKENIZER, Path(f"{config.data.prefix}.model")]
    path = next((place for place in places if place.exists()), None)
    if path is None:
        raise UserError(f"{places[0]}: missing; put the SentencePiece model there that made the run's token files")
    tokenizer = Tokenizer(path)
    size = config.model.vocab_size
    if size is not None and tokenizer.vocab_size > size:
        raise UserError(
            f"{path}: has {tokenizer.vocab_size} tokens, the run's model {size}; put the tokenizer of its data there"
        )
    return tokenizer
