"""Multiple choice, exact match and classes: the figures by hand, the same in every layout."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megapar.config.file import dump
from megapar.data.records import LABELS
from megapar.launch.pool import WorkerPool
from megapar.train.loop import run as train_loop
from tests.evaluate.runs import Plainly, evaluate, train
from tests.records import WORDS, prepared, write
from tests.tiny import tiny_config

EXACT = 1e-12  # fp64: other orders of sums
TAUGHT = {"red>": "blue", "cat>": "dog house", "tree>": "8"}
QUESTIONS = [
    {"prompt": "red>", "choices": ["blue", "green", "b"], "answer": 0},
    {"prompt": "cat> ", "choices": ["é dog", "dog house"], "answer": "dog house"},
    {"prompt": "", "choices": ["red", "zz"], "answer": 1},
]


@pytest.fixture(scope="session")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that knows three answers by heart."""
    folder = tmp_path_factory.mktemp("taught")
    lines = [{"prompt": prompt, "response": response} for prompt, response in TAUGHT.items()] * 4
    keys = prepared(folder, "instructions", lines, split=0.0)
    return train(folder / "run", 60, **keys | {"task.name": "sft", "train.seq_length": 32, "optim.lr": 2e-2})


@pytest.fixture(scope="session")
def sorter(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plainly]:
    """A run of a classifier, by the training loop, and its model; of its records nothing is left."""
    folder = tmp_path_factory.mktemp("sorter")
    lines = [{"text": f"{word} {name}", "label": name} for word in WORDS for name in WORDS[:3]]
    keys = prepared(folder, "labelled", lines, split=0.0)
    keys |= {"task.name": "classify", "train.seq_length": 16, "run.dir": str(folder / "run")}
    encoder: dict[str, Any] = {"model.causal": False, "train.steps": 8, "logger.wandb.mode": "disabled"}
    config = tiny_config("", **keys | encoder)
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text(dump(config))
    train_loop(config, 0, 1)
    model = Plainly(folder / "run")
    shutil.rmtree(folder / "cache")
    return folder / "run", model


@pytest.mark.parametrize("layout", ["single", "tp2pp2"])
def test_choices(layout: str, pool: WorkerPool, taught: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "quiz.jsonl", QUESTIONS)
    found = evaluate(pool, taught, layout, choices=str(path), batch_size=3)["choices"]
    model = Plainly(taught)
    encode, end = model.tokenizer.encode, model.tokenizer.end_of_text
    whole = [[("red>", "blue"), ("red>", "green"), ("red>", "b")], [("cat>", " é dog"), ("cat>", " dog house")]]
    expected = [
        [model.log_likelihood(encode(a), encode(a + b)[len(encode(a)) :]) for a, b in pairs] for pairs in whole
    ] + [[model.log_likelihood([end], encode(text)) for text in ("red", "zz")]]
    for item, likely, sizes, question in zip(
        found["items"], expected, [[4, 5, 1], [6, 9], [3, 2]], QUESTIONS, strict=True
    ):
        assert item["log_likelihoods"] == pytest.approx(likely, rel=EXACT)
        assert item["bytes"] == sizes
        assert item["chosen"] == int(np.argmax(likely))
        assert item["chosen_by_byte"] == int(np.argmax(np.array(likely) / sizes))
        assert item["answer"] == (1 if question["answer"] == "dog house" else question["answer"])
    right = [item["chosen"] == item["answer"] for item in found["items"]]
    assert found["accuracy"] == pytest.approx(np.mean(right))
    assert found["accuracy_stderr"] == pytest.approx(np.std(right, ddof=1) / np.sqrt(3))
    assert right[0]


@pytest.mark.parametrize("layout", ["single", "tp2pp2"])
def test_match(layout: str, pool: WorkerPool, taught: Path, tmp_path: Path) -> None:
    """What is longer or shorter than what the model writes is no match."""
    wanted = [*TAUGHT.items(), ("red>", "green"), ("red>", "blu"), ("red>", "blue dog")]
    path = write(tmp_path / "tasks.jsonl", [{"prompt": prompt, "response": response} for prompt, response in wanted])
    found = evaluate(pool, taught, layout, match=str(path))["match"]
    assert [item["matches"] for item in found["items"]] == [True] * 3 + [False] * 3
    assert [item["written"] for item in found["items"][:3]] == list(TAUGHT.values())
    assert found["exact_match"] == 0.5


@pytest.mark.parametrize("layout", ["single", "tp2pp2", "dp2"])
def test_labels(layout: str, pool: WorkerPool, sorter: tuple[Path, Plainly], tmp_path: Path) -> None:
    lines = [{"text": f"the {word} {name}"[4 * (number % 2) :], "label": name} for number, word in enumerate(WORDS)
             for name in ("red", "green")]  # fmt: skip
    path = write(tmp_path / "test.jsonl", lines)
    found = evaluate(pool, sorter[0], layout, labels=str(path), batch_size=5)["labels"]
    names = json.loads((sorter[0] / LABELS).read_text())
    assert names == sorted(WORDS[:3])
    model = sorter[1]
    rows = []
    for line, item in zip(lines, found["items"], strict=True):
        tokens = [*model.tokenizer.encode(line["text"]), model.tokenizer.end_of_text]
        rows.append(model.outputs(tokens)["scores"][0].tolist())
        assert item["scores"] == pytest.approx(rows[-1], rel=EXACT, abs=EXACT)
        assert (item["label"], item["chosen"]) == (line["label"], names[int(np.argmax(rows[-1]))])
    chosen, right = [item["chosen"] for item in found["items"]], [line["label"] for line in lines]
    assert found["accuracy"] == pytest.approx(np.mean([a == b for a, b in zip(chosen, right, strict=True)]))
    for name, figures in found["classes"].items():
        hits = sum(a == b == name for a, b in zip(chosen, right, strict=True))
        for figure, count in (("precision", chosen.count(name)), ("recall", right.count(name))):
            assert figures[figure] == (pytest.approx(hits / count) if count else None)
        assert figures["texts"] == right.count(name)
    assert found["classes"]["blue"]["recall"] is None
