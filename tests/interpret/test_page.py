"""The page of `megapar interpret`, and what a run keeps of its own inside."""

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import megapar
from megapar.cli import main
from megapar.config.errors import ConfigError
from megapar.config.schema import TrainConfig
from megapar.interpret.page import Reading, page_of
from megapar.launch.pool import WorkerPool
from megapar.train.loop import run
from megapar.train.trainer import Trainer
from tests.tiny import tiny_config

PROMPT = "alpha </script> beta\ngamma & <b>"


def data_of(page: str) -> Any:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def weights_of(data: Any) -> np.ndarray:
    size = len(data["tokens"])
    flat = np.frombuffer(base64.b64decode(data["weights"]), np.uint8)
    return flat.reshape(data["layers"], data["heads"], size, size).astype(np.float64) / 255


def test_a_page_of_four_ranks_is_that_of_one(run_dir: Path, tmp_path: Path) -> None:
    assert main(["interpret", str(run_dir), f"prompt={PROMPT}", "dtype=fp64", "top=3"]) == 0
    first = (run_dir / "interpret.html").read_text(encoding="utf-8")
    assert first.count("</script>") == 2, "a token has ended the data"
    data = data_of(first)
    assert "".join(data["tokens"]).replace("▁", " ") == PROMPT
    assert data["rows"] == ["embedding", "layers.0", "layers.1"] and len(data["said"][0][0]) == 3
    weights = weights_of(data)
    assert np.abs(weights.sum(-1) - 1).max() < 0.05 and np.triu(weights[0, 0], 1).max() == 0
    out = tmp_path / "four.html"
    line = ["interpret", str(run_dir), f"prompt={PROMPT}", "dtype=fp64", "top=3", "parallel=tp2pp2", f"out={out}"]
    assert main(line) == 0
    second = data_of(out.read_text(encoding="utf-8"))
    assert np.abs(weights_of(second) - weights).max() <= 1 / 255 + 1e-9  # of what is rounded to 1/255
    assert {key: second[key] for key in ("tokens", "said")} == {key: data[key] for key in ("tokens", "said")}
    np.testing.assert_allclose(second["chances"], data["chances"], rtol=0, atol=1.01e-4)


def test_a_page_says_what_the_library_says(run_dir: Path) -> None:
    """The likeliest next tokens of the last layer are those of the model's own logits."""
    assert main(["interpret", str(run_dir), "prompt=alpha beta", "dtype=fp64"]) == 0
    data = data_of((run_dir / "interpret.html").read_text(encoding="utf-8"))
    out = run_dir / "text.txt"
    assert main(["generate", str(run_dir), "prompt=alpha beta", "sample.temperature=0", "sample.max_tokens=1",
                 "dtype=fp64", f"out={out}"]) == 0  # fmt: skip
    written = out.read_text(encoding="utf-8").removeprefix("alpha beta").rstrip("\n")
    assert data["words"][data["said"][-1][-1][0]].replace("▁", " ") in (written, "\n", "<1>")


def test_a_page_fetches_nothing() -> None:
    tokens, none = ["<!--", "<script>", "</script>"], torch.zeros(0)
    reading = Reading("a <run>", "facts & figures", tokens, [], [], none, none, torch.eye(2).expand(1, 1, 2, 2))
    page = page_of(reading)
    assert "a &lt;run&gt;" in page and "facts &amp; figures" in page and "%%" not in page

    class Links(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert not {"src", "href"} & {name for name, _ in attrs} and tag not in ("link", "img", "iframe")

    Links().feed(page)
    plain = page_of(replace(reading, tokens=["x", "y", "z"]))
    for obeyed in ("<!--", "<script", "</script"):  # a tokenizer may have such tokens
        assert page.count(obeyed) == plain.count(obeyed)
    assert not re.search(r"https?:|fetch\(|import", page)


def test_what_is_refused(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["prompt="], "prompt=: says what the model reads; give prompt=TEXT"),
        ([f"prompt={'a b ' * 30}"], r"the model's context holds train.seq_length=24; shorten it"),
        (["prompt=x", "top=0"], "top=0: must be at least 1"),
    ):
        assert main(["interpret", str(run_dir), *words]) == 2
        assert said in capsys.readouterr().err


def rank_runs(rank: int, world_size: int, config: TrainConfig) -> None:
    run(config, rank, world_size)


LOOKS: dict[str, Any] = {
    "interpret.capture": ["layers.1.attention.heads", "logits"],
    "interpret.statistics": True,
    "interpret.every": 3,
    "train.steps": 4,
    "logger.wandb.mode": "disabled",
}


def test_a_run_keeps_what_it_is_asked_for(pool: WorkerPool, tokens: str, tmp_path: Path) -> None:
    """Steps 1 and 3, the same numbers in every layout, and the weights of a run that is not looked into."""
    kept: dict[str, Any] = {}
    for layout in ("single", "tp2", "pp2", "dp2"):
        config = tiny_config(tokens, layout, **LOOKS | {"run.dir": str(tmp_path / layout)})
        (tmp_path / layout).mkdir()
        pool.run(rank_runs, config.parallel.layout.world, config)
        folder = tmp_path / layout / "interpret"
        assert sorted(path.name for path in folder.iterdir()) == [
            f"step-0000000{step}.{ending}" for step in (1, 3) for ending in ("json", "safetensors")
        ]
        found = {step: load_file(folder / f"step-0000000{step}.safetensors") for step in (1, 3)}
        sizes = {step: json.loads((folder / f"step-0000000{step}.json").read_text())["sites"] for step in (1, 3)}
        kept[layout] = found, sizes
    expected, figures = kept["single"]
    assert list(figures[1]) == ["embedding", "layers.0", "layers.1"]
    assert expected[3]["layers.1.attention.heads"].shape == (8, 8, 4, 4) and expected[1]["logits"].shape == (8, 8, 61)
    x = expected[3]["logits"]
    assert not torch.equal(x, expected[1]["logits"])
    for found, sizes in kept.values():
        for step in (1, 3):
            for name, tensor in expected[step].items():
                assert (found[step][name] - tensor).abs().max() < 1e-12 * tensor.abs().max()
            for name, one in figures[step].items():
                for part in ("value", "gradient"):
                    assert sizes[step][name][part] == pytest.approx(one[part], rel=1e-9, abs=1e-15)
    trainer = Trainer(tiny_config(tokens), 0)
    for step in (1, 2):
        trainer.step(step)
    with megapar.capture(trainer, ["logits", "layers.0"], gradients=True) as seen:
        trainer.step(3)
    assert torch.equal(seen["logits"], x)
    assert figures[3]["layers.0"]["gradient"]["rms"] == pytest.approx(
        seen["layers.0.gradient"].square().mean().sqrt().item()
    )
    trainer.close()


def test_sites_are_refused_before_a_run_begins(tokens: str) -> None:
    with pytest.raises(ConfigError, match=r"^interpret.capture=layers.7: no such place; there are embedding"):
        tiny_config(tokens, "single", **{"interpret.capture": ["layers.7"]})
