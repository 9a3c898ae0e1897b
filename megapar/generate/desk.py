"""Where requests wait and from where their texts go back: between the threads of an HTTP server and the ranks' loop."""

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from queue import Queue
from typing import Any

from megapar.config.run_schema import SampleConfig, ServeLimits
from megapar.data.tokenizer import Tokenizer
from megapar.generate.requests import Refusal
from megapar.generate.stops import Stops
from megapar.generate.text import TextStream
from megapar.generate.tokens import Text


@dataclass(frozen=True)
class Event:
    """Of a choice: text that it goes on with, or why it ended: stop, length, broken."""

    choice: int
    text: str = ""
    ended: str | None = None


class Choice:
    """A text that a client waits for. `dropped`: nobody does any more."""

    def __init__(
        self, tokenizer: Tokenizer, index: int, prompt: list[int], sample: SampleConfig, stops: Sequence[str],
        events: "Queue[Event]",
    ) -> None:  # fmt: skip
        self.index, self.prompt, self.sample, self.events = index, prompt, sample, events
        self.stops = Stops(stops, lambda text: events.put(Event(index, text)))
        self._stream = TextStream(tokenizer, self.stops.put, prompt)
        self.written, self.dropped = 0, False

    def take(self, text: Text) -> None:
        """Pass on what is new of the text, and how it ended."""
        for token in text.written[self.written :]:
            self._stream.put(token)
        self.written = len(text.written)
        if text.ended and not self.stops.stopped:
            self._stream.finish()
            self.stops.finish()
        if text.ended or self.stops.stopped:
            self.events.put(Event(self.index, ended="stop" if self.stops.stopped else text.ended))


@dataclass
class Desk:
    """Thread-safe. Choices wait in the order in which they came."""

    limits: ServeLimits
    _waiting: deque[Choice] = field(default_factory=deque)
    _running: dict[int, Choice] = field(default_factory=dict)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _number: int = 0

    def submit(self, choices: Sequence[Choice]) -> None:
        """Let choices wait. Raises Refusal where there are too many."""
        most = self.limits.max_batch + self.limits.max_queue
        if len(choices) > most:
            raise Refusal(400, f"{len(choices)} texts in a request; at most {most}, serve.max_batch + serve.max_queue")
        with self._changed:
            present = len(self._waiting) + sum(not one.dropped for one in self._running.values())
            if present + len(choices) > most:
                raise Refusal(429, f"{present} texts are being written or wait; try again later")
            self._waiting += choices
            self._changed.notify()

    def drop(self, choices: Sequence[Choice]) -> None:
        """Nobody waits for these any more."""
        with self._changed:
            for choice in choices:
                choice.dropped = True
            self._waiting = deque(choice for choice in self._waiting if not choice.dropped)
            self._changed.notify()

    def order(self, timeout: float) -> dict[str, Any] | None:
        """What the ranks are to do before their next step: {"leave": numbers, "join": [{number, tokens, sample}]}.

        None: nothing. While nothing is being written either, only after `timeout` seconds.
        """
        with self._changed:
            if not self._running and not self._waiting:
                self._changed.wait(timeout)
            leave = [number for number, one in self._running.items() if one.dropped or one.stops.stopped]
            for number in leave:
                del self._running[number]
            join = []
            while self._waiting and len(self._running) < self.limits.max_batch:
                choice = self._waiting.popleft()
                self._number += 1
                self._running[self._number] = choice
                join.append({"number": self._number, "tokens": choice.prompt, "sample": asdict(choice.sample)})
        return {"leave": leave, "join": join} if leave or join else None

    def take(self, texts: dict[int, Text]) -> None:
        """Pass on what a step has written."""
        for number, text in texts.items():
            self._running[number].take(text)
            if text.ended:
                with self._changed:
                    del self._running[number]


def choices_of(
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    samples: Sequence[SampleConfig],
    stops: Sequence[str],
    events: "Queue[Event]",
) -> list[Choice]:
    """Every choice of every prompt, in OpenAI's order."""
    pairs = [(prompt, sample) for prompt in prompts for sample in samples]
    return [Choice(tokenizer, index, *pair, stops, events) for index, pair in enumerate(pairs)]
