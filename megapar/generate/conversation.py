"""A conversation as the tokens that a model continues: by the tokenizer's chat template, or as a plain transcript.

Without a template a conversation reads

    User: How?
    Assistant: So.
    User: Why?
    Assistant:

and an answer ends where the model begins to write for the user. Answers stay as the tokens that the model wrote, so
that what is cached of them stays right.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megapar.config.errors import UserError
from megapar.data.tokenizer import Tokenizer
from megapar.data.tokenizer.contract import ASSISTANT, NEXT_USER, USER


@dataclass(frozen=True)
class _Turn:
    """rest: text of the answer behind its tokens, where a stop string began inside one"""

    message: str
    answer: list[int]
    rest: str


class Conversation:
    """What was said, as far as the context holds it with room for an answer: `max_tokens`, or a quarter of the context.

    stops: strings that end an answer
    """

    def __init__(self, tokenizer: Tokenizer, context_length: int, max_tokens: int) -> None:
        self._tokenizer, self._context_length = tokenizer, context_length
        self._room = min(max_tokens, context_length // 4)
        self._turns: list[_Turn] = []
        self._message = ""
        self.stops: Sequence[str] = () if tokenizer.has_template else (NEXT_USER,)

    def ask(self, message: str) -> tuple[list[int], int]:
        """(what the model is to continue, how many of the oldest turns were left out for it). Raises UserError for a
        message that does not fit, and nothing has changed then."""
        for left_out in range(len(self._turns) + 1):
            tokens = self._tokens(self._turns[left_out:], message)
            if len(tokens) + self._room <= self._context_length:
                break
        if len(tokens) > self._context_length:
            hold = f"the context holds train.seq_length={self._context_length}"
            raise UserError(f"a message of {len(tokens)} tokens, and {hold}; shorten it")
        self._turns, self._message = self._turns[left_out:], message
        return tokens, left_out

    def answered(self, tokens: Sequence[int], length: int) -> None:
        """What the model answered. length: characters of it that count, up to a stop string"""
        kept = len(tokens)
        while kept and len(self._tokenizer.decode(tokens[:kept])) > length:
            kept -= 1
        before = len(self._tokenizer.decode(tokens[:kept]))
        rest = self._tokenizer.decode(tokens)[before:length] if kept < len(tokens) else ""
        self._turns.append(_Turn(self._message, list(tokens[:kept]), rest))

    def _tokens(self, turns: Sequence[_Turn], message: str) -> list[int]:
        if self._tokenizer.has_template:
            said: list[Any] = [part for turn in turns for part in (turn.message, turn.answer)]
            return self._tokenizer.chat(*said, message)
        found: list[int] = []
        rest = ""
        for turn in turns:
            found += self._tokenizer.encode(f"{rest}{USER}{turn.message}{ASSISTANT}") + turn.answer
            rest = f"{turn.rest}\n"
        return found + self._tokenizer.encode(f"{rest}{USER}{message}{ASSISTANT}")
