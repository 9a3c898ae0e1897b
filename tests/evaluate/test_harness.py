"""lm-evaluation-harness asks our models, and gets what `megapar eval` says."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megapar.launch.pool import WorkerPool
from tests.evaluate.runs import TAUGHT, Plainly, evaluate
from tests.records import write

pytestmark = pytest.mark.slow
TASK = """task: quiz
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_bytes
"""
WRITING = """task: writing
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{response}}}}"
target_delimiter: ""
generation_kwargs:
  until: ["!"]
  max_gen_toks: 12
metric_list:
  - metric: exact_match
"""
QUESTIONS = [
    {"prompt": "red>", "choices": ["blue", "green", "red cat"], "answer": 0},
    {"prompt": "cat> ", "choices": ["eight", "dog house", "tree"], "answer": 1},
    {"prompt": "seven>", "choices": ["tree", "seven", "é"], "answer": 2},
]


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two tasks."""
    pytest.importorskip("lm_eval")
    for name, value in {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    quiz = write(tmp_path / "quiz.jsonl", QUESTIONS)
    texts = [{"prompt": prompt, "response": response} for prompt, response in TAUGHT.items()]
    (folder / "quiz.yaml").write_text(TASK.format(data=quiz))
    (folder / "writing.yaml").write_text(WRITING.format(data=write(tmp_path / "texts.jsonl", texts)))
    return folder


def test_in_one_process(pool: WorkerPool, taught: Path, tasks: Path) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows

    from megapar.evaluate.kinds.text import windows
    from megapar.library.harness import MegaparLM

    model = MegaparLM(taught, batch_size=3)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    options: dict[str, Any] = {"bootstrap_iters": 0, "log_samples": True, "task_manager": manager}
    found = lm_eval.simple_evaluate(model=model, tasks=["quiz", "writing"], **options)
    ours = evaluate(pool, taught, choices=str(tasks.parent / "quiz.jsonl"), dtype="fp32")["choices"]
    for sample, item in zip(found["samples"]["quiz"], ours["items"], strict=True):
        likely = [float(answer[0]) for answer in sample["filtered_resps"]]
        assert likely == pytest.approx(item["log_likelihoods"], rel=1e-6, abs=1e-6)  # fp32, in other batches
    results = found["results"]
    assert results["quiz"]["acc,none"] == pytest.approx(ours["accuracy"])
    assert results["quiz"]["acc_bytes,none"] == pytest.approx(ours["accuracy_by_byte"])
    assert results["writing"]["exact_match,none"] == 1.0
    request = SimpleNamespace(args=("red> cat dog house tree green blue " * 3,))
    [rolled] = model.loglikelihood_rolling([request])
    tokens, plainly, length = model.tok_encode(request.args[0]), Plainly(taught), model.context_length
    theirs = list(get_rolling_token_windows(tokens, model.prefix_token_id, length, 1))
    mine = windows([model.prefix_token_id, *tokens], length, length)
    assert [(span.tokens[:-1], span.tokens[span.first :]) for span in mine] == theirs
    expected = sum(plainly.log_likelihood([*a, b[-1]][: len(a) + 1 - len(b)], b) for a, b in theirs)
    assert rolled == pytest.approx(expected, rel=1e-5)  # of fp32 weights in fp64
    model.close()


def test_its_command_under_torchrun(taught: Path, tasks: Path) -> None:
    out = tasks.parent / "results"
    line = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "megapar.library.harness"]
    line += ["--model", "megapar", "--model_args", f"run={taught},layout=tp2,dtype=fp64", "--tasks", "quiz"]
    line += ["--include_path", str(tasks), "--output_path", str(out)]
    done = subprocess.run([sys.executable, *line], env=os.environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("|quiz") == 1
    [path] = out.rglob("results_*.json")
    assert json.loads(path.read_text())["results"]["quiz"]["acc,none"] == pytest.approx(2 / 3)
