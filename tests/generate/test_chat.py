"""`megapar chat`: conversations as tokens, and the command in any layout, from a pipe, and with Ctrl-C."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megapar.config.derive import resolve_forward
from megapar.config.errors import UserError
from megapar.config.keys import changed
from megapar.config.run_schema import ChatConfig
from megapar.data.tokenizer import Tokenizer, open_tokenizer
from megapar.generate.conversation import Conversation
from megapar.generate.stops import Stops
from megapar.launch.pool import WorkerPool
from tests.cli.conftest import clean_environment
from tests.data import hf
from tests.generate import jobs

CONTROLS = hf.CONTROLS


@pytest.mark.parametrize("step", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one two three", [" three", "two"], "one "),
        ("one two three", ["x", "threes"], "one two three"),
        ("aab", ["ab"], "a"),
        ("\n\nUser", ["\n\nUsers", "\n\n\n"], "\n\nUser"),
        ("x", [], "x"),
        ("stop", ["stop"], ""),
    ],
)
def test_stops(text: str, stops: list[str], expected: str, step: int) -> None:
    """The same in whatever pieces the text comes."""
    pieces: list[str] = []
    found = Stops(stops, pieces.append)
    for first in range(0, len(text), step):
        found.put(text[first : first + step])
        assert expected.startswith("".join(pieces))
    found.finish()
    assert ("".join(pieces), found.length, found.stopped) == (expected, len(expected), expected != text)


@pytest.fixture(scope="module")
def plain(talker: Path) -> Tokenizer:
    return open_tokenizer(talker / "tokenizer.model")


def test_a_transcript(plain: Tokenizer) -> None:
    """What was said before is a prefix, token by token, of what the model is to continue."""
    conversation = Conversation(plain, 200, 10)
    first, _ = conversation.ask("alpha")
    assert plain.decode(first) == "User: alpha\nAssistant:"
    answer = [*plain.encode(" be"), *plain.encode("ta")]  # not as the tokenizer would write it
    conversation.answered(answer, len(plain.decode(answer)))
    second, left_out = conversation.ask("gamma")
    assert second[: len(first) + len(answer)] == first + answer
    assert plain.decode(second) == "User: alpha\nAssistant: beta\nUser: gamma\nAssistant:" and not left_out


def test_an_answer_that_wrote_for_the_user(plain: Tokenizer) -> None:
    conversation = Conversation(plain, 200, 10)
    first, _ = conversation.ask("alpha")
    answer = plain.encode(" beta naïve\nUser: x")
    conversation.answered(answer, len(" beta naïv"))
    second, _ = conversation.ask("gamma")
    assert plain.decode(second) == "User: alpha\nAssistant: beta naïv\nUser: gamma\nAssistant:"
    assert second[: len(first) + 1] == first + answer[:1]


def test_old_turns_are_left_out(plain: Tokenizer) -> None:
    conversation = Conversation(plain, 60, 100)  # room for 15
    left: list[int] = []
    for number in range(8):
        tokens, left_out = conversation.ask(f"m{number}")
        assert len(tokens) + 15 <= 60
        left.append(left_out)
        conversation.answered(plain.encode(f" a{number}"), 3)
    assert left[0] == 0 and max(left) == 1 and sum(left) > 2
    before = conversation.ask("x")
    with pytest.raises(UserError, match=r"a message of \d+ tokens, and the context holds train\.seq_length=60"):
        conversation.ask("alpha " * 50)
    assert conversation.ask("x") == (before[0], 0)


def test_a_template_keeps_the_tokens_of_answers(tmp_path: Path) -> None:
    """As the model wrote them, whatever a template does around them; and messages make no control tokens."""
    tokenizer = open_tokenizer(hf.gpt2_like(tmp_path, chat_template=hf.CHATML))
    conversation = Conversation(tokenizer, 500, 10)
    first, _ = conversation.ask("How?")
    answer = [*tokenizer.encode(" al"), *tokenizer.encode("pha")]
    conversation.answered(answer, 6)
    second, _ = conversation.ask("Why<|im_end|>?")
    end = CONTROLS.index("<|im_end|>")
    assert second[: len(first) + len(answer) + 1] == [*first, *answer, end]
    assert sum(token == end for token in second) == 3
    assert tokenizer.decode(second).endswith("user\nWhy<|im_end|>?\nassistant\n")
    assert not conversation.stops
    assert tokenizer.answer_ends == set(range(len(CONTROLS)))


LINES = ["alpha", "", "beta gamma", "naïve"]


def chat(pool: WorkerPool, run_dir: Path, ranks: int, **values: Any) -> tuple[str, list[int]]:
    given = {"run.dir": str(run_dir), "sample.max_tokens": 12, "dtype": "fp64"}
    config = resolve_forward(changed(ChatConfig(), given | values))
    found = pool.run(jobs.chat, ranks, config, LINES)
    assert not any(text for text, _ in found[1:])
    assert all(counts == found[0][1] for _, counts in found)
    return found[0]


def test_the_same_answers_in_any_layout(pool: WorkerPool, talker: Path) -> None:
    """And what was said before goes through the model once: each turn reads what is new of it."""
    text, counts = chat(pool, talker, 1)
    assert text.count("\n") >= 3
    assert counts[0] < 40
    assert chat(pool, talker, 4, **{"parallel.tp": 2, "parallel.pp": 2}) == (text, counts)


def test_a_control_token_ends_an_answer(pool: WorkerPool, talker: Path) -> None:
    config = resolve_forward(changed(ChatConfig(), {"run.dir": str(talker), "sample.max_tokens": 12}))
    [(text, _)] = pool.run(jobs.chat, 1, config, LINES, range(403))
    assert text == "\n\n\n"


@pytest.mark.more
@pytest.mark.parametrize("end", ["/exit", "Ctrl-C"])
def test_a_pipe_and_ctrl_c(talker: Path, end: str) -> None:
    """Ctrl-C stops an answer that would take minutes, and the next message is answered; where nothing is being written,
    it ends the command."""
    command = [sys.executable, "-m", "megapar.cli", "chat", str(talker)]
    command += ["sample.max_tokens=1000000", "sample.temperature=0"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, env=clean_environment()) as process:
        assert process.stdin and process.stdout and process.stderr
        try:
            for _ in range(2):
                process.stdin.write(b"alpha\n")
                process.stdin.flush()
                assert process.stdout.read(100)
                process.send_signal(signal.SIGINT)
                while not (line := process.stdout.readline()).endswith(b"(stopped)\n"):
                    assert line
            if end == "/exit":
                process.stdin.write(b"/exit\n")
                process.stdin.flush()
            else:
                process.send_signal(signal.SIGINT)
            code, errors = process.wait(60), process.stderr.read().strip()
            assert (code, errors) == ((0, b"") if end == "/exit" else (130, b"interrupted"))
        finally:
            process.kill()
