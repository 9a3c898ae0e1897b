"""Text to token ids and back: one contract, of which a SentencePiece model and a `tokenizer.json` are the two kinds."""

from megapar.data.tokenizer.contract import Tokenizer, check_unicode
from megapar.data.tokenizer.files import open_tokenizer

__all__ = ["Tokenizer", "check_unicode", "open_tokenizer"]
