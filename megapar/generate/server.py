"""The HTTP of `megapar serve`: OpenAI's completions, on this machine alone."""

import json
import select
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Empty, Queue
from typing import Any

from megapar.config.errors import ConfigError, UserError
from megapar.config.run_schema import ServeConfig
from megapar.data.media.samples import first_mark
from megapar.data.tokenizer import Tokenizer
from megapar.generate.desk import Choice, Desk, Event, choices_of
from megapar.generate.requests import Completion, Refusal, parse
from megapar.generate.text import prompt_tokens

HOST = "127.0.0.1"
LOOK_S = 0.5  # how often it is looked whether a client that waits is still there
BROKEN = "the model's logits are not finite: its training diverged"


class Server(ThreadingHTTPServer):
    """Answers in threads of its own. name: of the model; has_media: whether it reads images or sound, which are not
    served; raises ConfigError where the port can't be had."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self, config: ServeConfig, name: str, desk: Desk, tokenizer: Tokenizer, context_length: int, *, has_media: bool
    ) -> None:
        self.config, self.name, self.desk, self.tokenizer = config, name, desk, tokenizer
        self.context_length, self.has_media, self.started = context_length, has_media, int(time.time())
        self._encoding = threading.Lock()
        try:
            super().__init__((HOST, config.port), Handler)
        except OSError as error:
            raise ConfigError("port", config.port, f"can't be had ({error.strerror}); name another one") from None

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_address[1]}"

    def start(self) -> None:
        threading.Thread(target=self.serve_forever, name="http", daemon=True).start()

    def encode(self, prompt: str | list[int]) -> list[int]:
        """The tokens of a prompt. Raises Refusal where it can't be encoded or is longer than the context."""
        if isinstance(prompt, str):
            if self.has_media and (mark := first_mark(prompt)):
                raise Refusal(400, f"{mark}: images and sound are not served; use `megapar generate`", "prompt")
            try:
                with self._encoding:
                    tokens = prompt_tokens(self.tokenizer, prompt)
            except UserError as error:
                raise Refusal(400, str(error), "prompt") from None
        else:
            tokens, known = prompt, self.tokenizer.vocab_size
            if max(tokens) >= known:
                raise Refusal(400, f"prompt: token {max(tokens)}, and the tokenizer has {known}", "prompt")
        if len(tokens) > self.context_length:
            hold = f"the model's context holds {self.context_length}; shorten it"
            raise Refusal(400, f"a prompt of {len(tokens)} tokens, and {hold}", "prompt", "context_length_exceeded")
        return tokens

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no error; anything else goes to the log."""
        if not isinstance(sys.exc_info()[1], OSError):
            traceback.print_exc()


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Server
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds for a client to send its request

    def do_GET(self) -> None:
        match self.path.partition("?")[0]:
            case "/health":
                self._send(200, {"status": "ok"})
            case "/v1/models":
                model = {"id": self.server.name, "object": "model", "created": self.server.started}
                self._send(200, {"object": "list", "data": [model | {"owned_by": "megapar"}]})
            case "/v1/completions":
                self._refuse(Refusal(405, "POST a request to /v1/completions"))
            case _:
                self._refuse(self._no_route())

    def do_POST(self) -> None:
        try:
            if self.path.partition("?")[0] != "/v1/completions":
                raise self._no_route()
            self._complete(self._body())
        except Refusal as refusal:
            self._refuse(refusal)
        except OSError:  # the client has gone
            self.close_connection = True
        except Exception:
            traceback.print_exc()
            self._refuse(Refusal(500, "the server failed at this request; its log says why"))

    def _refuse_method(self) -> None:
        self._refuse(Refusal(405, f"{self.command} is not answered; use GET or POST"))

    do_HEAD = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = _refuse_method

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server refuses itself, in the same form."""
        self._refuse(Refusal(code, message or self.responses.get(code, ("refused", ""))[0]))

    def log_message(self, format: str, *args: Any) -> None:
        print(f"{self.log_date_time_string()} {format % args}", flush=True)  # to the rank's log

    def _no_route(self) -> Refusal:
        known = "POST /v1/completions, GET /v1/models, GET /health"
        return Refusal(404, f"{self.path.partition('?')[0]}: nothing here; there are {known}")

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit():
            raise Refusal(411, "a request needs its Content-Length")
        most = self.server.config.serve.max_body
        if len(length) > 18 or int(length) > most:
            raise Refusal(413, f"a body of {length} bytes; serve.max_body={most} is the most")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise Refusal(400, f"the body ends after {len(body)} of its Content-Length={length} bytes")
        return body

    def _complete(self, body: bytes) -> None:
        server, config = self.server, self.server.config
        asked = parse(body, server.name, config.sample, config.serve)
        prompts = [server.encode(prompt) for prompt in asked.prompts]
        events: Queue[Event] = Queue()
        choices = choices_of(server.tokenizer, prompts, asked.samples, asked.stops, events)
        server.desk.submit(choices)
        try:
            answer = _Answer(server.name, sum(map(len, prompts)), choices)
            (self._stream if asked.stream else self._whole)(asked, answer, self._events(events, len(choices)))
        finally:
            server.desk.drop(choices)

    def _events(self, events: "Queue[Event]", choices: int) -> Iterator[Event]:
        """All of a request. Raises ConnectionAbortedError when its client has gone."""
        look = time.monotonic() + LOOK_S
        while choices:
            event = None
            with suppress(Empty):
                event = events.get(timeout=max(0.0, look - time.monotonic()))
            if time.monotonic() >= look:  # of text that nobody reads there may always be more
                if self._gone():
                    raise ConnectionAbortedError
                look = time.monotonic() + LOOK_S
            if event is not None:
                choices -= event.ended is not None
                yield event

    def _gone(self) -> bool:
        readable = select.select([self.connection], [], [], 0)[0]
        return bool(readable) and self.connection.recv(1, socket.MSG_PEEK) == b""

    def _whole(self, asked: Completion, answer: "_Answer", events: Iterator[Event]) -> None:
        texts = [""] * len(answer.choices)
        reasons = [""] * len(answer.choices)
        for event in events:
            texts[event.choice] += event.text
            reasons[event.choice] = event.ended or ""
            if event.ended == "broken":
                raise Refusal(500, BROKEN)
        choices = [answer.choice(index, *pair) for index, pair in enumerate(zip(texts, reasons, strict=True))]
        self._send(200, answer.body(choices) | {"usage": answer.usage()})

    def _stream(self, asked: Completion, answer: "_Answer", events: Iterator[Event]) -> None:
        """Server-sent events. They end with the connection, as nobody knows how many there will be."""
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-cache")
        self.send_header("Connection", "close")
        self.end_headers()
        for event in events:
            if event.ended == "broken":
                self._event(json.dumps(Refusal(500, BROKEN).body))
                break
            self._event(json.dumps(answer.body([answer.choice(event.choice, event.text, event.ended)])))
        else:
            if asked.stream_usage:
                self._event(json.dumps(answer.body([]) | {"usage": answer.usage()}))
        self._event("[DONE]")

    def _event(self, data: str) -> None:
        self.wfile.write(f"data: {data}\n\n".encode())
        self.wfile.flush()

    def _refuse(self, refusal: Refusal) -> None:
        self.close_connection = True  # what the client still sends is no request
        self._send(refusal.status, refusal.body)

    def _send(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            if self.close_connection:
                self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(data)
        except OSError:  # the client has gone
            self.close_connection = True


class _Answer:
    """The bodies of one answer."""

    def __init__(self, model: str, prompt_tokens: int, choices: list[Choice]) -> None:
        self.choices, self._prompt_tokens = choices, prompt_tokens
        head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time())}
        self._head = head | {"model": model}

    def body(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._head | {"choices": choices}

    @staticmethod
    def choice(index: int, text: str, reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}

    def usage(self) -> dict[str, int]:
        """Of all choices; every prompt counts once."""
        written = sum(choice.written for choice in self.choices)
        total = self._prompt_tokens + written
        return {"prompt_tokens": self._prompt_tokens, "completion_tokens": written, "total_tokens": total}
