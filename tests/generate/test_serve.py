"""`megapar serve`: one server in one process and one of tp2, asked over HTTP; and its parts alone."""

import contextlib
import http.client
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

import pytest

from megapar.cli import main
from megapar.config.derive import resolve_forward
from megapar.config.keys import changed
from megapar.config.run_schema import GenerateConfig, SampleConfig, ServeConfig, ServeLimits
from megapar.data.tokenizer import open_tokenizer
from megapar.generate.desk import Choice, Desk, choices_of
from megapar.generate.requests import Refusal, parse
from megapar.generate.server import Server
from megapar.launch.pool import WorkerPool
from tests.cli.conftest import clean_environment
from tests.cli.test_cli_launch import wait_for
from tests.generate import jobs
from tests.generate.conftest import POISON

LIMITS = ServeLimits(max_batch=2, max_queue=2, max_tokens=100_000, max_body=4000)


@dataclass
class Served:
    process: "subprocess.Popen[bytes]"
    port: int

    def ask(
        self, body: Any, path: str = "/v1/completions", method: str = "POST", timeout: float = 60
    ) -> tuple[int, Any]:
        """(status, JSON) of a request; bytes are sent as they are. Raises TimeoutError."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        connection.request(method, path, body if isinstance(body, bytes) else json.dumps(body))
        answer = connection.getresponse()
        found = json.loads(answer.read())
        connection.close()
        return answer.status, found

    def text(self, **asked: Any) -> str:
        status, found = self.ask(asked)
        assert status == 200, found
        text: str = found["choices"][0]["text"]
        return text

    def stream(self, **asked: Any) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("POST", "/v1/completions", json.dumps(asked | {"stream": True}))
        return connection, connection.getresponse()


def events(answer: http.client.HTTPResponse) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in answer.read().decode().split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def serve(run_dir: Path, *overrides: str) -> Iterator[Served]:
    limits = [f"serve.{name}={value}" for name, value in vars(LIMITS).items()]
    command = [sys.executable, "-m", "megapar.cli", "serve", str(run_dir), "port=0", "dtype=fp64", *limits, *overrides]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, env=clean_environment(), start_new_session=True)
    assert process.stdout is not None
    said = process.stdout.readline().decode()
    assert said.startswith("run at http://127.0.0.1:"), process.communicate()[1].decode()
    yield Served(process, int(said.split(":")[2].partition("/")[0]))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.decode().strip()) == (130, "interrupted")
    with pytest.raises(ProcessLookupError):  # nobody of its session is left
        for _ in range(100):
            os.killpg(process.pid, 0)
            time.sleep(0.1)


@pytest.fixture(scope="module")
def served(talker: Path) -> Iterator[Served]:
    yield from serve(talker)


SHORT = {"max_tokens": 12, "seed": 3, "temperature": 0.7}


def by_generate(pool: WorkerPool, run_dir: Path, prompt: str) -> str:
    """What `megapar generate` writes behind a prompt for `SHORT`."""
    values: dict[str, Any] = {f"sample.{key}": value for key, value in SHORT.items()}
    values |= {"run.dir": str(run_dir), "prompt": prompt, "out": str(run_dir / "out.txt"), "dtype": "fp64"}
    assert pool.run(jobs.generate, 1, resolve_forward(changed(GenerateConfig(), values))) == [None]
    return (run_dir / "out.txt").read_text(encoding="utf-8").removeprefix(prompt).removesuffix("\n")


PROMPTS = ["alpha", "naïve", "be", "gamma delta"]


def test_answers(pool: WorkerPool, talker: Path, served: Served) -> None:
    """Those of `megapar generate`, alone or beside others, whole or as a stream."""
    expected = [by_generate(pool, talker, prompt) for prompt in PROMPTS]
    assert [served.text(prompt=prompt, **SHORT) for prompt in PROMPTS] == expected
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda prompt: served.text(prompt=prompt, **SHORT), PROMPTS)) == expected
    status, found = served.ask({"prompt": PROMPTS[:2], "n": 2, "model": "run", **SHORT})
    assert status == 200 and found["model"] == "run" and found["object"] == "text_completion"
    assert [choice["text"] for choice in found["choices"][::2]] == expected[:2]
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
    assert {choice["finish_reason"] for choice in found["choices"]} <= {"length", "stop"}
    usage = found["usage"]
    assert usage["completion_tokens"] <= 48 and usage["total_tokens"] == sum(usage.values()) / 2
    _, answer = served.stream(prompt=PROMPTS[0], stream_options={"include_usage": True}, **SHORT)
    *chunks, last, used = events(answer)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected[0] and len(chunks) > 3
    assert last["choices"][0]["finish_reason"] in ("length", "stop") and used["usage"]["prompt_tokens"] > 0
    tokens = [open_tokenizer(talker / "tokenizer.model").encode(prompt) for prompt in PROMPTS[:2]]
    assert served.text(prompt=tokens[0], best_of=1, **SHORT) == expected[0]
    assert [choice["text"] for choice in served.ask({"prompt": tokens, **SHORT})[1]["choices"]] == expected[:2]
    stop = expected[0][5:7]
    status, found = served.ask({"prompt": PROMPTS[0], "stop": stop, **SHORT})
    assert found["choices"][0]["text"] == expected[0].partition(stop)[0]
    assert found["choices"][0]["finish_reason"] == "stop"


BAD: list[tuple[Any, int, str]] = [
    (b"{", 400, "the body is no JSON"),
    (b"[" * 3000, 400, "the body is no JSON"),
    ([], 400, "no JSON object"),
    ({}, 400, "prompt=null: must be a text or its tokens, or a list of such"),
    ({"prompt": [1, "x"]}, 400, "prompt="),
    ({"prompt": [-1]}, 400, "prompt="),
    ({"prompt": [[1], []]}, 400, "prompt="),
    ({"prompt": [1, 5000]}, 400, "prompt: token 5000, and the tokenizer has"),
    ({"prompt": "x", "best_of": 2}, 400, "best_of is not supported"),
    ({"prompt": []}, 400, "prompt="),
    ({"prompt": "x", "max_tokens": 0}, 400, "max_tokens=0: must be a whole number from 1 to serve.max_tokens=100000"),
    ({"prompt": "x", "max_tokens": True}, 400, "max_tokens=true"),
    (b'{"prompt": "x", "temperature": NaN}', 400, "temperature=NaN"),
    ({"prompt": "x", "temperature": 10**400}, 400, "temperature=1"),
    ({"prompt": "x", "top_p": 0}, 400, "top_p=0"),
    ({"prompt": "x", "n": 3}, 400, "n=3: must be a whole number from 1 to serve.max_batch=2"),
    ({"prompt": "x", "stop": [""]}, 400, 'stop=[""]'),
    ({"prompt": "x", "stream": 1}, 400, "stream=1: must be true or false"),
    ({"prompt": "x", "logprobs": 3}, 400, "logprobs is not supported; leave it out"),
    ({"prompt": "x", "echo": True}, 400, "echo is not supported"),
    ({"prompt": "x", "colour": 1}, 400, "colour: unknown; leave it out"),
    ({"prompt": "x", "model": "other"}, 404, "the model 'other' is not here; this is 'run'"),
    ({"prompt": ["x"] * 5}, 400, "5 texts in a request; at most 4"),
    ({"prompt": "alpha " * 200}, 400, "and the model's context holds 96; shorten it"),
    (b'{"prompt": "\\ud800"}', 400, "not valid Unicode"),
    ({"prompt": "x" * 4000}, 413, "serve.max_body=4000 is the most"),
    ({"prompt": f"a{POISON}b", "max_tokens": 3}, 500, "logits are not finite"),
]


def test_what_is_refused(served: Served) -> None:
    for body, status, message in BAD:
        found, answer = served.ask(body)
        assert (found, set(answer)) == (status, {"error"}), (body, answer)
        assert message in answer["error"]["message"], answer
        assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert served.ask(b"", "/v2/other")[0] == 404
    assert served.ask(b"", "/v1/completions", "GET")[0] == 405
    assert served.ask(b"", "/v1/completions", "PATCH")[0] == served.ask(b"", "/v1/models", "OPTIONS")[0] == 405
    assert served.ask(b"", "/health", "GET") == (200, {"status": "ok"})
    status, models = served.ask(b"", "/v1/models", "GET")
    assert status == 200 and [model["id"] for model in models["data"]] == ["run"]
    post = b"POST /v1/completions HTTP/1.1\r\nContent-Length: "
    for sent in (b"nonsense\r\n\r\n", post + b"-1\r\n\r\n", post + b'99\r\n\r\n{"prompt": "x"}'):
        with socket.create_connection(("127.0.0.1", served.port), timeout=60) as raw:
            raw.sendall(sent)
            raw.shutdown(socket.SHUT_WR)
            assert b'"error"' in raw.makefile("rb").read()
    _, answer = served.stream(prompt=f"a{POISON}b", max_tokens=3)
    assert events(answer)[-1]["error"]["type"] == "server_error"
    assert served.text(prompt="alpha", **SHORT)


@pytest.mark.parametrize("has_media", [False, True])
def test_marks_of_images_are_refused_where_the_model_reads_images(talker: Path, has_media: bool) -> None:
    config = changed(ServeConfig(), {"port": 0})
    with Server(
        config, "run", Desk(config.serve), open_tokenizer(talker / "tokenizer.model"), 40, has_media=has_media
    ) as server:
        assert server.encode("alpha")
        refused = pytest.raises(Refusal, match=r"^<image>: images and sound are not served")
        with refused if has_media else contextlib.nullcontext():
            assert server.encode("alpha <image>")


def test_a_port_that_another_has(talker: Path, served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(talker), f"port={served.port}"]) == 2
    said = capsys.readouterr().err
    assert said == f"port={served.port}: can't be had (Address already in use); name another one\n"


def test_clients_that_go_free_their_places(served: Served) -> None:
    """Two are written for minutes, two wait, what comes then is refused; when they have gone, others are answered."""
    long = {"prompt": "alpha", "max_tokens": 100_000, "temperature": 0}
    opened = [served.stream(**long) for _ in range(2)]
    assert all(stream.readline() for _, stream in opened)
    sockets: list[socket.socket] = []
    refused: list[socket.socket] = []
    deadline = time.monotonic() + 60
    while not refused and time.monotonic() < deadline:  # not streamed: those that wait are sent nothing
        raw = socket.create_connection(("127.0.0.1", served.port))
        body = json.dumps(long).encode()
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        sockets.append(raw)
        refused = select.select(sockets, [], [], 0.5)[0]
    assert len(sockets) > 2
    answer = http.client.HTTPResponse(refused[0])
    answer.begin()
    assert answer.status == 429 and json.loads(answer.read())["error"]["type"] == "rate_limit_error"
    for one in [*sockets, *(part for pair in opened for part in pair)]:
        one.close()
    assert wait_for(lambda: served.ask({"prompt": "x", "max_tokens": 1})[0] == 200, 60)


@pytest.fixture(scope="module")
def served_tp2(talker: Path) -> Iterator[Served]:
    yield from serve(talker, "parallel=tp2")


@pytest.mark.more
def test_in_a_layout(pool: WorkerPool, talker: Path, served_tp2: Served) -> None:
    served, expected = served_tp2, [by_generate(pool, talker, prompt) for prompt in PROMPTS]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda prompt: served.text(prompt=prompt, **SHORT), PROMPTS)) == expected
    assert served.ask({"prompt": f"a{POISON}b", "max_tokens": 3})[0] == 500
    connection, answer = served.stream(prompt="alpha", max_tokens=100_000, temperature=0)
    assert answer.readline()
    answer.close()
    connection.close()
    assert served.text(prompt=PROMPTS[0], **SHORT) == expected[0]


def test_what_a_request_leaves_out() -> None:
    defaults = SampleConfig(top_k=7)
    found = parse(b'{"prompt": "x", "stop": null, "user": "me", "logprobs": null}', "run", defaults, LIMITS)
    [sample] = found.samples
    assert (sample.max_tokens, sample.temperature, sample.top_k, found.stream, found.stops) == (100, 0.8, 7, False, [])
    assert parse(b'{"prompt": "x"}', "run", defaults, LIMITS).samples != [sample]  # another seed every time
    few = ServeLimits(max_tokens=5)
    assert parse(b'{"prompt": "x"}', "run", defaults, few).samples[0].max_tokens == 5
    two = parse(b'{"prompt": "x", "n": 2, "seed": 4}', "run", defaults, LIMITS).samples
    assert [one.seed for one in two] == [4, 5]


def test_the_desk(talker: Path) -> None:
    """First come, first served, as places get free; who has gone is left out."""
    tokenizer, desk = open_tokenizer(talker / "tokenizer.model"), Desk(LIMITS)

    def choices(*prompts: int) -> list[Choice]:
        return choices_of(tokenizer, [[prompt] for prompt in prompts], [SampleConfig()], ["."], Queue())

    def order() -> tuple[list[int], list[tuple[int, int]]] | None:
        """(numbers that leave, (number, prompt) that join)"""
        found = desk.order(0.0)
        if found is None:
            return None
        return found["leave"], [(one["number"], one["tokens"][0]) for one in found["join"]]

    assert order() is None
    first, second = choices(10, 11, 12), choices(20)
    desk.submit(first)
    desk.submit(second)
    with pytest.raises(Refusal, match="4 texts are being written or wait"):
        desk.submit(choices(30))
    assert order() == ([], [(1, 10), (2, 11)])
    assert order() is None
    desk.drop([first[0], first[2]])
    assert order() == ([1], [(3, 20)])
    desk.submit(choices(40, 41))
    second[0].stops.put("never ends.")
    assert order() == ([3], [(4, 40)])
