"""Multiple choice, exact match and classes: the figures by hand, the same in every layout."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megapar.config.derive import resolve_forward
from megapar.config.keys import changed
from megapar.config.run_schema import GenerateConfig
from megapar.data.records import LABELS
from megapar.launch.pool import WorkerPool
from tests.data import hf
from tests.evaluate.runs import TAUGHT, Plainly, evaluate, train
from tests.generate.jobs import generate
from tests.records import WORDS, prepared, write

EXACT = 1e-12  # fp64: other orders of sums
QUESTIONS: list[dict[str, Any]] = [
    {"prompt": "red>", "choices": ["blue", "green", "red cat"], "answer": 0},
    {"prompt": "cat> ", "choices": ["é dog", "dog house"], "answer": "dog house"},
    {"prompt": "", "choices": ["red", "zz"], "answer": 1},
]
ALPACA = "{% for message in messages %}{{ message.role | upper }}: {{ message.content }}\n{% endfor %}"


@pytest.mark.parametrize("layout", ["single", "tp2pp2"])
def test_choices(layout: str, pool: WorkerPool, taught: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "quiz.jsonl", QUESTIONS)
    found = evaluate(pool, taught, layout, choices=str(path), batch_size=3)["choices"]
    model = Plainly(taught)
    encode, end = model.tokenizer.encode, model.tokenizer.end_of_text
    whole = [[("red>", "blue"), ("red>", "green"), ("red>", "red cat")], [("cat>", " é dog"), ("cat>", " dog house")]]
    expected = [
        [model.log_likelihood(encode(a), encode(a + b)[len(encode(a)) :]) for a, b in pairs] for pairs in whole
    ] + [[model.log_likelihood([end], encode(text)) for text in ("red", "zz")]]
    for item, likely, sizes, question in zip(
        found["items"], expected, [[4, 5, 7], [6, 9], [3, 2]], QUESTIONS, strict=True
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
    wanted = [*TAUGHT.items(), ("red>", "green"), ("red>", "blue dog"), ("seven>", "tre")]
    path = write(tmp_path / "tasks.jsonl", [{"prompt": prompt, "response": response} for prompt, response in wanted])
    found = evaluate(pool, taught, layout, match=str(path))["match"]
    assert [item["matches"] for item in found["items"]] == [True] * 3 + [False] * 3
    assert [item["written"] for item in found["items"][:3]] == list(TAUGHT.values())
    assert found["exact_match"] == 0.5


@pytest.mark.parametrize(
    "template", [pytest.param(hf.CHATML, marks=pytest.mark.slow), ALPACA], ids=["ChatML", "Alpaca"]
)
def test_match_of_conversations(template: str, pool: WorkerPool, tmp_path: Path) -> None:
    """After what a tuned model was taught, by a template that ends answers with a control token or with none; it ends
    its answers itself."""
    folder = hf.gpt2_like(tmp_path / "hf", chat_template=template)
    talks = [
        {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]}
        for prompt, response in TAUGHT.items()
    ]
    keys = prepared(tmp_path, "instructions", talks * 4, split=0.0, tokenizer=str(folder))
    keys |= {"task.name": "sft", "train.seq_length": 48, "optim.lr": 2e-2}
    run = train(tmp_path / "run", 60, **keys)
    wrong = [talks[0]["messages"][0], {"role": "assistant", "content": "blue dog"}]
    path = write(tmp_path / "talks.jsonl", [*talks, {"messages": wrong}])
    found = evaluate(pool, run, match=str(path))["match"]
    assert [item["matches"] for item in found["items"]] == [True] * 3 + [False]
    assert [item["written"] for item in found["items"][:3]] == list(TAUGHT.values())
    if template == ALPACA:  # it does not begin an answer
        return
    out, prompts = tmp_path / "out", write(tmp_path / "prompts.txt", ["red>", "cat>"])
    for given, text in (
        ({"prompt": "red>"}, "blue\n"),
        ({"prompt_file": str(prompts)}, '"completion": "dog house"}\n'),
    ):
        keys = {"run.dir": str(run), "chat": True, "sample.temperature": 0.0, "prompt": "", "out": str(out)}
        assert pool.run(generate, 1, resolve_forward(changed(GenerateConfig(), keys | given))) == [None]
        assert out.read_text().endswith(text)


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
