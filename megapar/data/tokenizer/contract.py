"""What every tokenizer does, whatever its kind."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from megapar.config.errors import ConfigError, UserError

# How SentencePiece, and what was made from its models, write a space inside pieces. So the character itself has no
# piece of its own and would come back as a space. Where a text contains it, it is spelled in byte tokens.
SPACE_MARK = "\u2581"
# Must survive encode and decode unchanged: a normaliser (NFKC), dropped spaces or a missing byte fallback shows here.
PROBE = "  \ufb01 A\u030a\t\r\n\n \u2460\u3000\U0001f389 \0</s><0x41>" + SPACE_MARK + "  "


# A conversation without a chat template is a transcript: `User: How?`, `Assistant: So.`, a line each.
USER, ASSISTANT, NEXT_USER = "User: ", "\nAssistant:", "\nUser:"
LIBRARIES = "is not installed; pip install 'megapar[hf]'"
Message = tuple[str, str]  # (role, content), the role system, user or assistant
Piece = tuple[list[int], bool]  # token ids, and whether an assistant wrote them


class RefusedConversation(Exception):
    """A conversation that can't be learned from. number: of it; problem: why, and what to do"""

    def __init__(self, number: int, problem: str) -> None:
        super().__init__(problem)
        self.number, self.problem = number, problem


class Tokenizer(ABC):
    """Text to token ids and back.

    path        its file, `.model` or `tokenizer.json`; what else belongs to it lies beside that one
    vocab_size  largest id + 1, added tokens included

    A tokenizer is lossless where `decode(encode(text)) == text` for every text and the bytes of each token are known.
    """

    path: Path
    vocab_size: int
    _bytes: list[bytes] | None = None  # [vocab_size], UTF-8, empty for control tokens; None: not lossless

    @property
    @abstractmethod
    def end_of_text(self) -> int:
        """Id of the token that closes every document. Raises ConfigError where there is none."""

    @property
    def classified(self) -> tuple[list[int], list[int]]:
        """Tokens in front of and behind a text to classify: [CLS] and [SEP], or else the end of the text alone."""
        return [], [self.end_of_text]

    @property
    def mask(self) -> int | None:
        """Id of the token that stands in place of one to be predicted: [MASK], or else one that no text becomes; None
        where there is neither."""
        return None

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, as `encode` gives them, on several threads."""

    @property
    def has_template(self) -> bool:
        """Whether there is a chat template."""
        return False

    @property
    def answer_ends(self) -> frozenset[int]:
        """Tokens that end an answer in a conversation, beside the end of text: with a chat template, control tokens."""
        return frozenset()

    @abstractmethod
    def chat(self, prompt: str, *more: str | Sequence[int]) -> list[int]:
        """Token ids of a conversation that `prompt`, a user's message, begins, up to where the next answer does.

        more: an answer, as the token ids that the model wrote, which stay as they are; the next message; and so on
        Raises ConfigError where there is no chat template, or where it does not take this prompt.
        """

    def conversations(self, given: Sequence[Sequence[Message]]) -> list[list[Piece]]:
        """Conversations to learn from, each maybe a system's message, then a user's and an assistant's in turn: token
        ids by who wrote them. What ends an answer counts as written by the assistant: in a transcript the end of the
        text, or the beginning of the user's next line; by a chat template what it writes behind the last answer up to
        its first control token, or else an end-of-text token, which is put behind every answer.

        Raises RefusedConversation where a chat template does not take one or does not write each of its answers, but
        for white space around them; and ConfigError where the template is broken.
        """
        return [self._transcript(messages) for messages in given]

    def _transcript(self, messages: Sequence[Message]) -> list[Piece]:
        head = f"{messages[0][1]}\n" if messages[0][0] == "system" else ""
        turns = [content for role, content in messages if role != "system"]
        pieces: list[Piece] = []
        head += USER
        for number in range(0, len(turns), 2):
            said, answer = turns[number : number + 2]
            pieces.append((self.encode(f"{head}{said}{ASSISTANT}"), False))
            head, last = " ", number + 2 == len(turns)  # the label of the user's next line is there already
            ids = self.encode(f" {answer}{'' if last else NEXT_USER}")
            pieces.append(([*ids, self.end_of_text] if last else ids, True))
        return pieces

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without an end-of-text token. No text becomes a control token.

        Raises UserError for text that is not valid Unicode.
        """
        return self.encode_batch([text])[0]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids. Control tokens give nothing, bytes that form no character give U+FFFD.

        Raises ValueError for an id outside the vocabulary.
        """
        tokens = [int(token) for token in ids]
        if tokens and not (min(tokens) >= 0 and max(tokens) < self.vocab_size):
            raise ValueError(f"token ids must be in 0..{self.vocab_size - 1}, got {min(tokens)}..{max(tokens)}")
        return self._text(tokens)

    def _text(self, tokens: list[int]) -> str:
        assert self._bytes is not None
        return b"".join([self._bytes[token] for token in tokens]).decode("utf-8", errors="replace")

    def piece(self, token: int) -> bytes | None:
        """UTF-8 bytes that a token stands for, none for a control token; None for a tokenizer that is not lossless."""
        return None if self._bytes is None else self._bytes[token]

    def char_counts(self) -> np.ndarray | None:
        """Characters that each token stands for, int32 [vocab_size]; None for a tokenizer that is not lossless.

        Their sum over `encode(text)` is `len(text)`: of a character in byte tokens, only the lead byte counts.
        """
        return None if self._char_counts is None else self._char_counts.copy()

    @cached_property
    def _char_counts(self) -> np.ndarray | None:
        if self._bytes is None:
            return None
        return np.array([sum((byte & 0xC0) != 0x80 for byte in piece) for piece in self._bytes], dtype=np.int32)


def encode_around_marks(text: str, encode: Callable[[str], list[int]], mark: list[int]) -> list[int]:
    """Token ids of text that contains SPACE_MARK: the parts between the marks, and `mark` for each of them."""
    tokens: list[int] = []
    for number, part in enumerate(text.split(SPACE_MARK)):
        tokens += mark if number else []
        tokens += encode(part) if part else []
    return tokens


def check_unicode(text: str) -> None:
    """Raise UserError for text that is not valid Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"text is not valid Unicode: lone surrogate at character {error.start}; remove it") from None


def refused(path: Path, problem: str) -> ConfigError:
    """The error for a tokenizer that can't be used."""
    return ConfigError("data.tokenizer", path, problem)
