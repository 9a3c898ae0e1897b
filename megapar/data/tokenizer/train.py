"""Training of the tokenizer that a text gets where the user gives none: SentencePiece BPE with byte fallback."""

import io
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megapar.config.errors import ConfigError, UserError
from megapar.data.tokenizer.contract import SPACE_MARK

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
BPE, BYTES = MADE = "bpe", "bytes"  # what `data.tokenizer` calls those that are made here
BYTE_ENTRIES = 260  # 256 bytes, the space's and the newline's own, the end of text, and one that nothing becomes
MAX_LINE = 1000  # characters of one training sentence; SentencePiece drops those above 4192 bytes


def make_tokenizer(name: str, texts: Iterable[str], vocab_size: int, model_path: Path) -> str:
    """Write the tokenizer of that name, one of MADE, to `model_path`, and return what it is in a few words. "bytes" has
    a token for every byte, whatever the texts are. Raises ConfigError, see `train_bpe`."""
    if name == BYTES:
        train_bpe([" "], BYTE_ENTRIES, model_path)
        return "tokens are bytes"
    train_bpe(texts, vocab_size, model_path)
    return f"trained a BPE tokenizer with {vocab_size} entries"


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
