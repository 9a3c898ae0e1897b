"""Training and writing with a `tokenizer.json`, by the command line; what can't work is refused at the start."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megapar.checkpoint import find_checkpoint, read_manifest
from megapar.cli import main
from megapar.data.tokenizer import open_tokenizer
from megapar.data.tokenizer.files import identity
from tests.data import hf
from tests.data.texts import make_text

SMALL = ["model.layers=2", "model.hidden=16", "model.heads=4", "data.split=0.2", "train.seq_length=16", "train.steps=2"]
SMALL += ["train.global_batch_size=8", "train.eval_every=2", "train.eval_samples=4", "logger.wandb.mode=disabled"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run's directory; its text, its tokenizer and the cache are gone."""
    root = tmp_path_factory.mktemp("trained")
    (root / "text").mkdir()
    for seed in range(12):
        (root / "text" / f"{seed}.txt").write_text(make_text(seed), encoding="utf-8")
    made = hf.gpt2_like(root / "hf", chat_template=hf.CHATML)
    data = [f"data.path={root / 'text'}", f"data.tokenizer={made}", f"data.cache={root / 'cache'}"]
    sample = ["task.sample_tokens=4", "task.sample_prompt=alpha  beta"]
    assert main(["train", *SMALL, *data, *sample, f"run.dir={root / 'run'}"]) == 0
    for name in ("text", "hf", "cache"):
        shutil.rmtree(root / name)
    yield root / "run"


def refusal(capsys: pytest.CaptureFixture[str], *line: str) -> str:
    """The last line, behind what preparing the data says."""
    capsys.readouterr()
    assert main(list(line)) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.more
def test_a_run_keeps_its_tokenizer_and_writes_with_it(trained: Path, tmp_path: Path) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["sample"].startswith("alpha  beta") and len(summary["sample"]) > len("alpha  beta")
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    bits = [row["val_bits_per_char"] for row in rows if "val_loss" in row]
    assert len(bits) == 2 and all(0 < bit < 10 for bit in bits)
    assert {path.name for path in trained.glob("tokenizer*")} == {"tokenizer.json", "tokenizer_config.json"}
    manifest = read_manifest(find_checkpoint(trained))
    assert manifest.data["tokenizer"] == identity(trained / "tokenizer.json")["sha256"]
    texts = []
    for more in (["parallel=tp2"], ["chat=true"], ["chat=true", "parallel=tp2"]):
        out = tmp_path / "out.txt"
        line = ["generate", str(trained), "prompt=alpha  beta", "sample.max_tokens=5", "dtype=fp64", f"out={out}"]
        assert main([*line, *more]) == 0
        texts.append(out.read_text(encoding="utf-8"))
    assert texts[0].startswith("alpha  beta") and len(texts[0]) > len("alpha  beta\n")
    assert texts[1] == texts[2] and not texts[1].startswith("alpha  beta")  # the answer alone, the same in every layout


@pytest.mark.more
def test_what_can_not_be_written_is_refused_before_a_rank_starts(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("logs"))
    line, config = ("generate", str(folder), "prompt=x", "chat=true"), folder / "tokenizer_config.json"
    hf.edit(folder, config.name, chat_template="{{ raise_exception('Say something else.') }}")
    assert refusal(capsys, *line).startswith("chat=true: the chat template: Say something else; fix the template")
    hf.edit(folder, config.name, chat_template=None)
    assert "tokenizer.json has no chat template; leave it out, or put chat_template.jinja" in refusal(capsys, *line)
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    more = {**spec["added_tokens"][-1], "id": 9999, "content": "<more>"}
    hf.edit(folder, added_tokens=[*spec["added_tokens"], {**more, "id": len(spec["model"]["vocab"]) + 1}])
    assert refusal(capsys, *line).startswith(
        f"{folder / 'tokenizer.json'}: has 402 tokens, the run's model 401; put the"
    )
    (folder / "tokenizer.json").write_text("{")
    assert "tokenizer.json: broken JSON" in refusal(capsys, *line)
    assert not (folder / "logs").exists()
    assert open_tokenizer(trained).vocab_size == 401


def test_a_vocabulary_that_is_too_small_and_a_folder_without_a_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], corpus: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    made = hf.gpt2_like(tmp_path / "hf")
    line = ["train", *SMALL, *corpus, "run.dir=run"]
    said = refusal(capsys, *line, f"data.tokenizer={made}", "model.vocab_size=400")
    assert said == "model.vocab_size=400: smaller than the tokenizer's 401; use at least that, or leave it out"
    said = refusal(capsys, *line, f"data.tokenizer={tmp_path}")
    assert said.startswith(f"data.tokenizer={tmp_path}: this folder has no tokenizer.json and no tokenizer.model; name")
    assert not (tmp_path / "run").exists()


def test_a_library_that_is_gone_is_said_before_a_rank_starts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    corpus: list[str],
    run: Callable,
) -> None:
    """Of a corpus that is prepared already, which needs it only for bits per character."""
    line = [*SMALL, f"data.tokenizer={hf.gpt2_like(tmp_path / 'hf')}", "run.dir=run"]
    assert main(["data", *corpus, line[-2]]) == 0
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert run("rows", "train", *line, "train.eval_every=0").code == 0
    done = run("rows", "train", *line, "run.dir=other")
    assert done.code == 2 and "the library tokenizers, which reads it, is not installed; pip" in done.err
    assert not (tmp_path / "other").exists()
