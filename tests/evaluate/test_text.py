"""Perplexity: the same as a plain loop has it, whatever the layout, the batch or the stride."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megapar.cli import main
from megapar.config.schema import DataConfig
from megapar.data.prepare import prepare
from megapar.evaluate.kind import Result
from megapar.evaluate.kinds.text import windows
from megapar.evaluate.run import lines_of
from megapar.launch.pool import WorkerPool
from tests.data.texts import make_text
from tests.evaluate.runs import Plainly, evaluate, train

LENGTH = 9  # odd: tp2 has to fill up batches of one row
EXACT = 1e-12  # fp64: other orders of sums


@pytest.fixture(scope="session")
def learned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The keys of a config that learns from real text."""
    folder = tmp_path_factory.mktemp("learned")
    (folder / "text.txt").write_text("".join(make_text(seed) for seed in range(8)), encoding="utf-8")
    data = DataConfig(path=str(folder / "text.txt"), vocab_size=400, split=0.0, cache=str(folder / "cache"))
    prefix = str(prepare(data).prefix)
    return {
        "data.path": prefix,
        "data.prefix": prefix,
        "data.split": 0.0,
        "model.vocab_size": 403,
        "train.seq_length": LENGTH,
    }


@pytest.fixture(scope="session")
def trained(learned: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("trained") / "run", **learned | {"model.position": "learned"})


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    """Two files: one of many windows, one of a few tokens."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(make_text(90, 24), encoding="utf-8")
    (tmp_path / "text" / "b.txt").write_bytes("naïve\r\n".encode())
    return tmp_path / "text"


def plainly(model: Plainly, folder: Path, stride: int) -> tuple[float, int]:
    """(nats, tokens): every token by itself, from as many tokens as the docs say."""
    nats, count = 0.0, 0
    for path in sorted(folder.iterdir()):
        text = path.read_bytes().decode()
        tokens = [model.tokenizer.end_of_text, *model.tokenizer.encode(text)]
        for place in range(1, len(tokens)):
            stop = place if place <= LENGTH else LENGTH + -(-(place - LENGTH) // stride) * stride
            start = max(0, min(stop, len(tokens) - 1) - LENGTH)
            nats -= model.log_likelihood(tokens[start:place], tokens[place : place + 1])
            count += 1
    return nats, count


@pytest.mark.parametrize(
    ("layout", "batch", "stride"), [("single", 8, None), ("tp2pp2", 5, None), ("dp2", 3, None), ("single", 1, LENGTH)]
)
def test_as_a_plain_loop_has_it(
    layout: str, batch: int, stride: int | None, pool: WorkerPool, trained: Path, held_out: Path
) -> None:
    found = evaluate(pool, trained, layout, text=str(held_out), batch_size=batch, stride=stride)["text"]
    nats, tokens = plainly(Plainly(trained), held_out, stride or LENGTH // 2)
    size = sum(path.stat().st_size for path in held_out.iterdir())
    characters = sum(len(path.read_bytes().decode()) for path in held_out.iterdir())
    assert (found["tokens"], found["bytes"], found["characters"], found["files"]) == (tokens, size, characters, 2)
    assert size > characters
    expected = {
        "nats_per_token": nats / tokens,
        "perplexity": math.exp(nats / tokens),
        "bits_per_byte": nats / math.log(2) / size,
        "bits_per_char": nats / math.log(2) / characters,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=EXACT, abs=0)


@pytest.mark.parametrize("based", [False, True])
def test_adapters(
    based: bool, pool: WorkerPool, learned: dict[str, Any], trained: Path, held_out: Path, tmp_path: Path
) -> None:
    """Beside initial values, which no checkpoint holds, and beside the weights of another run."""
    values = learned | {"model.position": "learned", "model.lora.rank": 2}
    run = train(tmp_path / "adapted", 3, **values | ({"model.lora.base": str(trained)} if based else {}))
    nats, tokens = plainly(Plainly(run), held_out, LENGTH // 2)
    for layout in ("single", "tp2pp2"):
        found = evaluate(pool, run, layout, text=str(held_out))["text"]
        assert found["nats_per_token"] == pytest.approx(nats / tokens, rel=EXACT, abs=0)


@pytest.mark.more
def test_the_command(pool: WorkerPool, trained: Path, held_out: Path, tmp_path: Path) -> None:
    """It starts ranks of its own."""
    out = tmp_path / "figures.json"
    assert main(["eval", str(trained), f"text={held_out}", "parallel=tp2", "dtype=fp64", f"out={out}"]) == 0
    found, expected = json.loads(out.read_text()), evaluate(pool, trained, text=str(held_out))
    assert (found["layout"], found["step"], found["text"]["path"]) == ("tp2", 2, str(held_out))
    assert found["text"]["nats_per_token"] == pytest.approx(expected["text"]["nats_per_token"], rel=EXACT)


def test_a_result_is_a_table() -> None:
    shown = lines_of("text=x", Result({}, [("tokens", "1,234"), ("loss", "4.5")], [("class", "recall"), ("a", "-")]))
    assert shown == ["text=x", "  tokens  1,234", "  loss      4.5", "  class  recall", "  a           -"]


def test_every_token_is_predicted_once() -> None:
    for total in range(2, 40):
        for stride in range(1, LENGTH + 1):
            tokens, place = list(range(total)), 1
            for span in windows(tokens, LENGTH, stride):
                assert span.tokens[span.first :] == tokens[place : place + span.predicted]
                assert span.predicted >= 1 <= span.first
                assert len(span.tokens) - 1 == min(LENGTH, total - 1) or place == 1
                assert place == 1 or span.first >= LENGTH - stride + 1
                place += span.predicted
            assert place == total
