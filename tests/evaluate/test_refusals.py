"""What can't be evaluated is refused in one line, with file and line number, before ranks start."""

import json
from pathlib import Path
from typing import Any

import pytest

from megapar.cli import main
from megapar.launch import local
from tests.records import write

GOOD = {"prompt": "red>", "choices": ["blue", "red"], "answer": 1}
LINES: dict[str, list[tuple[Any, str]]] = {
    "choices": [
        ("{", "not JSON"),
        (GOOD | {"answer": 2}, '"answer" is 2, and choices are counted from 0 to 1'),
        (GOOD | {"answer": -1}, '"answer" is -1, and'),
        (GOOD | {"answer": True}, '"answer" must be the number of a choice'),
        (GOOD | {"answer": "green"}, '"answer" is none of the choices'),
        (GOOD | {"choices": ["blue"]}, '"choices" has 1; give at least two'),
        (GOOD | {"choices": ["blue", ""]}, '"choices" must be a list of strings, none of them empty'),
        (GOOD | {"choices": ["blue", "\ud800"]}, "not valid Unicode"),
        (GOOD | {"prompt": 1}, '"prompt" is a number'),
        (GOOD | {"prompt": "red " * 30}, "tokens, of which train.seq_length=32 fit; shorten the prompt"),
    ],
    "match": [
        ({"prompt": "red>"}, 'has no "response"'),
        ({"messages": [{"role": "user", "content": "a"}]}, '"messages" has the roles user: user and assistant take'),
        ({"messages": [{"role": "user", "content": "a " * 40}, {"role": "assistant", "content": "b"}]}, "=32 fit"),
        ({"prompt": "red>", "response": " "}, '"response" is blank'),
        ({"prompt": "red>", "response": "blue " * 30}, "of which train.seq_length=32 fit"),
    ],
    "labels": [
        ({"text": "a", "label": "pink"}, 'the label "pink" is none of the model\'s, which has blue, green, red'),
        ({"text": "red cats " * 9, "label": "red"}, "of which train.seq_length=16 fit; shorten the text, or"),
    ],
}
CASES = [(key, line, problem) for key, lines in LINES.items() for line, problem in lines]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """What a command line is refused with."""

    def starts(job: Any) -> None:
        raise AssertionError("ranks start")

    monkeypatch.setattr(local, "launch", starts)

    def call(*line: str) -> str:
        assert main(["eval", *line]) == 2
        [said] = capsys.readouterr().err.splitlines()
        return said

    return call


@pytest.mark.parametrize(("key", "line", "problem"), CASES, ids=[f"{key}-{problem[:30]}" for key, _, problem in CASES])
def test_lines(key: str, line: Any, problem: str, refused: Any, taught: Path, sorter: Any, tmp_path: Path) -> None:
    good = {"choices": GOOD, "match": {"prompt": "a", "response": "b"}, "labels": {"text": "a", "label": "red"}}[key]
    path = write(tmp_path / "lines.jsonl", [good, "", line])
    said = refused(str(sorter[0] if key == "labels" else taught), f"{key}={path}")
    assert said.startswith(f"{path}:3: ")
    assert problem in said


def test_keys(refused: Any, taught: Path, sorter: Any, tmp_path: Path) -> None:
    run, classifier = str(taught), str(sorter[0])
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("some text")
    (tmp_path / "bytes.txt").write_bytes(b"a\n\xff")
    path, nothing = tmp_path / "text.txt", tmp_path / "nothing"
    for words, problem in {
        (run,): "text=null: there is nothing to evaluate; give text=FILE",
        (f"text={path}",): "run.dir=null: says which run's model it is; give run.dir=RUN",
        (run, f"text={nothing}"): f"text={nothing}: no such file",
        (run, f"text={tmp_path / 'empty'}"): f"text={tmp_path / 'empty'}: the folder has no files in it",
        (
            run,
            f"text={tmp_path / 'bytes.txt'}",
        ): f"text={tmp_path / 'bytes.txt'}: not UTF-8 text at offset 2, in line 2",
        (run, f"choices={nothing}"): f"choices={nothing}: no such file",
        (run, f"text={path}", "stride=33"): "stride=33: would leave tokens out between windows of train.seq_length=32",
        (run, f"labels={path}"): f"labels={path}: this run has model.output=lm; use a run with model.output=classes",
        (classifier, f"text={path}"): f"text={path}: this run has model.output=classes; use labels=FILE",
        (run, f"text={path}", "parallel=tp3"): "model.heads=4: not divisible by parallel.tp=3",
        (run, f"text={path}", f"out={nothing}/x"): f"out={nothing}/x: there is no such folder",
    }.items():
        assert refused(*words).startswith(problem), words


def test_without_its_labels(refused: Any, sorter: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "lines.jsonl", [{"text": "a", "label": "red"}])
    names = sorter[0] / "labels.json"
    kept = names.read_text()
    names.write_text(json.dumps({"red": 0}))
    try:
        assert refused(str(sorter[0]), f"labels={path}").startswith(f"{names}: not there, or no list of names")
    finally:
        names.write_text(kept)
