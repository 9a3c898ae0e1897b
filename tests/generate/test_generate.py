"""`megapar generate`: from a run directory to text."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from megapar.checkpoint import save
from megapar.config.derive import resolve, resolve_forward
from megapar.config.file import dump, load_config
from megapar.config.keys import changed
from megapar.config.schema import DataConfig, GenerateConfig
from megapar.data.prepare import prepare
from megapar.data.tokenizer import open_tokenizer
from megapar.data.tokenizer.files import MODEL
from megapar.data.tokenizer.train import train_bpe
from megapar.generate.text import keep_tokenizer
from megapar.launch.pool import WorkerPool
from megapar.train.trainer import Trainer
from tests.data.texts import make_text
from tests.generate import jobs
from tests.tiny import tiny_config

PROMPT = "alpha  naïve 中文\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run on real text; what it was prepared from is gone."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text("".join(make_text(seed) for seed in range(8)), encoding="utf-8")
    data = DataConfig(path=str(folder / "text.txt"), vocab_size=400, split=0.0, cache=str(folder / "cache"))
    prepared = prepare(data)
    values: dict[str, Any] = {
        "model.vocab_size": 403,
        "data.split": 0.0,
        "run.dir": str(folder / "run"),
        "train.dtype": "fp32",
    }
    config = tiny_config(str(prepared.prefix), **values)
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text(dump(config))
    keep_tokenizer(config)
    trainer = Trainer(config, 0)
    for step in (1, 2):
        trainer.step(step)
        save(folder / "run" / "checkpoints", trainer.optimizer, config, step)
    shutil.rmtree(folder / "cache")
    return folder / "run"


def generate(pool: WorkerPool, run_dir: Path, ranks: int = 1, **values: Any) -> Any:
    """What the ranks say; the text goes to `out`."""
    given = {"run.dir": str(run_dir), "prompt": PROMPT, "sample.max_tokens": 20, "out": str(run_dir / "out.txt")}
    config = resolve_forward(changed(GenerateConfig(), given | values))
    lines = pool.run(jobs.generate, ranks, config)
    assert len(set(lines)) == 1, "every rank ends alike"
    return lines[0]


def test_writes_prompt_and_continuation_in_any_layout(pool: WorkerPool, trained: Path) -> None:
    texts = []
    layouts: list[tuple[int, dict[str, Any]]] = [(1, {}), (4, {"parallel.tp": 2, "parallel.pp": 2})]
    for ranks, layout in layouts:
        assert generate(pool, trained, ranks, dtype="fp64", **layout) is None
        texts.append((trained / "out.txt").read_text(encoding="utf-8"))
    assert texts[0].startswith(PROMPT)
    assert len(texts[0]) > len(PROMPT) + 20
    assert texts[0] == texts[1]
    assert generate(pool, trained, dtype="bf16", **{"sample.seed": 5}) is None
    assert (trained / "out.txt").read_text(encoding="utf-8") != texts[0]


def test_another_checkpoint(pool: WorkerPool, trained: Path) -> None:
    texts = []
    for step in ("", "checkpoints/step-00000001", "checkpoints/step-00000002"):
        values: dict[str, Any] = {"checkpoint.load": str(trained / step), "sample.temperature": 3.0}
        assert generate(pool, trained, **values) is None
        texts.append((trained / "out.txt").read_text(encoding="utf-8"))
    assert texts[0] == texts[2] != texts[1]


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    """A run directory to damage."""
    return shutil.copytree(trained, tmp_path / "run")


def test_no_checkpoint(pool: WorkerPool, copy: Path) -> None:
    shutil.rmtree(copy / "checkpoints")
    assert f"{copy}: holds no checkpoint" in generate(pool, copy, 2, **{"parallel.tp": 2})


def test_no_tokenizer(pool: WorkerPool, copy: Path) -> None:
    (copy / MODEL).unlink()
    assert f"{copy / MODEL}: missing" in generate(pool, copy)


def test_other_tokenizer(pool: WorkerPool, copy: Path, tmp_path: Path) -> None:
    texts = [make_text(seed + 50) for seed in range(8)]
    train_bpe(texts, 380, copy / MODEL)
    assert f"{copy / MODEL}: not the tokenizer of this checkpoint" in generate(pool, copy, 2, **{"parallel.pp": 2})
    train_bpe(texts, 410, copy / MODEL)
    assert open_tokenizer(copy / MODEL).vocab_size == 410
    assert "has 410 tokens, the run's model 403" in generate(pool, copy)


def test_out_that_can_not_be_written(pool: WorkerPool, trained: Path) -> None:
    """Only rank 0 writes; the other must not wait for it."""
    line = generate(pool, trained, 2, **{"parallel.tp": 2, "out": str(trained / "nothing" / "out.txt")})
    assert line.startswith("out=")
    assert "can't be written (No such file or directory)" in line


def test_checkpoint_of_another_model(pool: WorkerPool, trained: Path, copy: Path) -> None:
    other = resolve(changed(load_config(copy), {"model.ffn": 48}))
    (copy / "config.yaml").write_text(dump(other))
    assert "model.ffn=48: " in generate(pool, copy)
