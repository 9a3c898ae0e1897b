"""`megapar train` as a user runs it: what a run leaves behind, whatever the layout."""

import json
from pathlib import Path
from typing import Any

import pytest

from megapar.cli import main
from tests.tiny import VOCABULARY, write_tokens
from tests.train.wandb_file import history

SMALL = [
    "model.layers=2",
    "model.hidden=16",
    "model.heads=4",
    "model.kv_heads=2",
    f"model.vocab_size={VOCABULARY}",
    "train.seq_length=8",
    "train.micro_batch_size=1",
    "train.global_batch_size=8",
    "train.steps=6",
    "train.dtype=fp64",
    "train.eval_every=3",
    "train.eval_samples=5",
    "data.split=0.2",
    "optim.lr=1e-2",
]


def rows_of(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of steps, rows of evaluations."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row], [row for row in rows if "val_loss" in row]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same run in one process and in 3D; the 3D one is stopped after step 4 and resumed in another layout."""
    base = tmp_path_factory.mktemp("runs")
    prefix = write_tokens(base)
    folders = {name: base / name for name in ("one", "all", "half", "rest")}

    def train(name: str, *overrides: str) -> None:
        arguments = ["train", *SMALL, f"data.path={prefix}", f"run.dir={folders[name]}", *overrides]
        assert main(arguments) == 0

    train("one", "logger.wandb.mode=disabled")
    train("all", "parallel=tp2pp2dp2", "parallel.zero=1", "parallel.sequence_parallel=true")
    train("half", "parallel=tp2pp2dp2", "parallel.zero=1", "checkpoint.every=4", "logger.wandb.mode=disabled")
    step_4 = folders["half"] / "checkpoints" / "step-00000004"
    train("rest", "parallel=pp2", f"checkpoint.load={step_4}", "logger.wandb.mode=disabled")
    return folders


def test_the_loss_is_the_same_in_every_layout(runs: dict[str, Path]) -> None:
    one, all_ = rows_of(runs["one"]), rows_of(runs["all"])
    assert [row["step"] for row in all_[0]] == [1, 2, 3, 4, 5, 6]
    for row, expected in zip(all_[0], one[0], strict=True):
        # fp64 rounding of a sum in another order, grown over six steps at a high learning rate
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-10)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-8)
        assert row["lr"] == expected["lr"] and row["tokens"] == expected["tokens"] == 64 * row["step"]
    assert [row["step"] for row in all_[1]] == [0, 3, 6]
    for row, expected in zip(all_[1], one[1], strict=True):
        assert row["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-10)
        assert row["val_bits_per_char"] is None  # these tokens came without a tokenizer


def test_rows_have_every_figure(runs: dict[str, Path]) -> None:
    for name, stages, microbatches in (("one", 1, 8), ("all", 2, 4)):
        for row in rows_of(runs[name])[0]:
            assert row["tokens_per_s"] == pytest.approx(64 / row["step_time_s"])
            assert 0.0 <= row["bubble"] < 1.0
            assert row["bubble_ideal"] == pytest.approx((stages - 1) / (microbatches + stages - 1))
            assert row["exposed_comm_s"].keys() == {"tp", "pp", "dp", "world"}
            assert all(0.0 <= seconds < row["step_time_s"] for seconds in row["exposed_comm_s"].values())
            assert row["cores_per_rank"] > 0 and row["skipped_steps"] == 0


def test_wandb_has_the_same_rows(runs: dict[str, Path]) -> None:
    pytest.importorskip("wandb")
    logged = history(runs["all"])
    steps = {row["step"]: row for row in logged if "loss" in row}
    for row in rows_of(runs["all"])[0]:
        assert steps[row["step"]]["loss"] == row["loss"]
        assert steps[row["step"]]["grad_norm"] == row["grad_norm"]
    evaluations = {row["step"]: row["val_loss"] for row in logged if "val_loss" in row}
    assert evaluations == {row["step"]: row["val_loss"] for row in rows_of(runs["all"])[1]}


def test_a_resumed_run_goes_on_where_it_was_in_another_layout(runs: dict[str, Path]) -> None:
    whole, rest = rows_of(runs["all"])[0], rows_of(runs["rest"])[0]
    assert [row["step"] for row in rest] == [5, 6]
    for row, expected in zip(rest, whole[4:], strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-10)
        assert row["tokens"] == expected["tokens"]


_TRACED = ("trace.json", "costs.json", "run.svg")


def test_the_run_directory(runs: dict[str, Path]) -> None:
    folder = runs["all"]
    for name in ("config.yaml", "overrides.yaml", "environment.json", "metrics.jsonl", "summary.json", *_TRACED):
        assert (folder / name).stat().st_size > 0, name
    assert sorted(path.name for path in (folder / "logs").iterdir()) == [f"rank-{rank}.log" for rank in range(8)]
    assert (folder / "checkpoints" / "step-00000006" / "manifest.json").exists()
    assert (runs["half"] / "checkpoints" / "step-00000004").exists()
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["kernels"]["attention"] == "torch"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["layout"] == {"tp": 2, "pp": 2, "dp": 2}
    assert summary["loss"] == rows_of(folder)[0][-1]["loss"]
