"""`megapar chat`: one rank of a model that talks."""

import json
from typing import Any

from megapar.config.errors import UserError
from megapar.config.run_schema import ChatConfig
from megapar.console import console, typed
from megapar.generate.conversation import Conversation
from megapar.generate.run import Writer
from megapar.generate.stops import Stops
from megapar.generate.text import TextStream
from megapar.generate.tokens import Text, refuse_broken
from megapar.parallel.agreement import broadcast_text, first_says
from megapar.stop import stop_request

HEARTBEAT_S = 10.0  # ranks that wait for a message hear that often that there is none


def run_rank(config: ChatConfig, rank: int, world_size: int) -> None:
    """Answer messages to the end of what is typed, as rank `rank` of `world_size`. Rank 0 reads and writes.

    Keys and values stay between turns: only what is new of the conversation goes through the model. Raises UserError.
    """
    writer = Writer(config, rank)
    world, device = writer.part.mesh["world"], writer.part.mesh.device
    side = _Terminal(config, writer) if rank == 0 else None
    pause = min(HEARTBEAT_S, writer.part.mesh.timeout_s / 4)
    text: Text | None = None
    while True:
        order = broadcast_text(side.order(pause) if side is not None else None, world, device)
        if order is None:
            continue
        tokens = json.loads(order)
        if tokens is None:
            break
        if text is None:
            text = Text(tokens, config.sample, ends=writer.tokenizer.answer_ends)
        else:
            text.goes_on(tokens, config.sample)
        _answer(writer, text, side)
        refuse_broken(text)
    writer.part.close()


def _answer(writer: Writer, text: Text, side: "_Terminal | None") -> None:
    """Write an answer to its end, or until rank 0 says stop."""
    world, device = writer.part.mesh["world"], writer.part.mesh.device
    stopped = False
    while not text.ended and not stopped:
        writer.generator.step([text])
        stopped = first_says(side is not None and side.take(text), world, device)
    if side is not None:
        side.end(text)


class _Terminal:
    """Rank 0's side: messages in, answers out."""

    def __init__(self, config: ChatConfig, writer: Writer) -> None:
        self._tokenizer = writer.tokenizer
        self._conversation = Conversation(writer.tokenizer, writer.prompt_length, config.sample.max_tokens)
        self._typed, self._shown, self._read = typed(), False, 0
        self._interrupted = False
        self._stream: Any = None
        self._stops = Stops((), self._write)

    def order(self, timeout: float) -> str | None:
        """The tokens to continue as JSON, null to end; None: nothing was typed within `timeout` seconds."""
        if not self._shown and console().isatty():
            self._write("> ")
        self._shown = True
        try:
            line = self._typed.line(timeout)
        except EOFError:
            return "null"
        if line is None:
            return None
        self._shown = False
        if not line.strip():
            return None
        if line.strip() == "/exit":
            return "null"
        try:
            tokens, left_out = self._conversation.ask(line)
        except UserError as error:
            self._write(f"{error}\n")
            return None
        if left_out:
            turns = "turn is" if left_out == 1 else f"{left_out} turns are"
            self._write(f"(the oldest {turns} left out: the context is full)\n")
        self._begin(tokens)
        return json.dumps(tokens)

    def _begin(self, prompt: list[int]) -> None:
        self._stops = Stops(self._conversation.stops, self._write)
        self._stream, self._read = TextStream(self._tokenizer, self._stops.put, prompt), len(prompt)
        stop_request().listen(True)

    def take(self, text: Text) -> bool:
        """Write what is new of an answer. Returns whether it is to stop here."""
        for token in text.tokens[self._read :]:
            self._stream.put(token)
        self._read = len(text.tokens)
        self._interrupted = stop_request().heard()
        return self._stops.stopped or self._interrupted

    def end(self, text: Text) -> None:
        stop_request().listen(False)
        stop_request().heard()  # it came too late
        self._stream.finish()
        self._stops.finish()
        self._write(" (stopped)\n" if self._interrupted else "\n")
        self._conversation.answered(text.written, self._stops.length)

    def _write(self, text: str) -> None:
        print(text, end="", file=console(), flush=True)
