"""Loss spikes: the score, and a poisoned batch whose update every rank leaves out, in any layout."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from megapar.config.keys import changed
from megapar.config.schema import TrainConfig
from megapar.launch.pool import WorkerPool
from megapar.pipeline.stage import Batch, Tensors
from megapar.tasks.kinds.lm import LanguageModeling
from megapar.train.loop import Loop
from megapar.train.spikes import LEAST, MOST, Window, robust_z
from tests.tiny import tiny_config

POISONED = {13: 101, 15: 119}  # sample by step, 8 of them in each


def test_score_of_normal_values_counts_standard_deviations() -> None:
    values = np.random.default_rng(0).normal(3.0, 0.5, 20_001)
    assert robust_z(3.0 + 4 * 0.5, values) == pytest.approx(4.0, abs=0.1)
    outliers = [*values, *[1e9] * 200]
    assert robust_z(3.0 + 4 * 0.5, outliers) == pytest.approx(4.0, abs=0.1)
    assert robust_z(1.0, [1.0 + 1e-13, 1.0, 1.0]) == pytest.approx(0.0, abs=1e-6)


def fed(window: Window, values: Sequence[float]) -> list[bool | None]:
    """What is said of steps with these losses: whether they are left out; None: no spike."""
    return [None if (found := window.judge(value, 1.0)) is None else found["skipped"] for value in values]


def test_no_spike_among_too_few_and_none_downward() -> None:
    assert fed(Window(5.0, skip=True), [1.0] * (LEAST - 1) + [50.0]) == [None] * LEAST
    steady = [1.0 + 0.01 * (n % 3) for n in range(LEAST)]
    assert fed(Window(5.0, skip=True), [*steady, 0.1, 1.0]) == [None] * (LEAST + 2)


def test_a_new_level_is_no_spike_for_long() -> None:
    steady = [1.0 + 0.01 * (n % 3) for n in range(LEAST)]
    higher = [value + 1.0 for value in steady * 2]
    said = fed(Window(5.0, skip=True), [*steady, *higher])
    assert said == [None] * LEAST + [True] * MOST + [False] + [None] * (len(higher) - MOST - 1)
    assert fed(Window(5.0, skip=False), [*steady, 2.0, 1.01]) == [None] * LEAST + [False, None]


def test_a_window_from_rows_is_the_one_that_was() -> None:
    random = np.random.default_rng(1)
    window, rows = Window(2.0, skip=True), []
    for loss, norm in [*random.standard_cauchy((300, 2)).tolist(), *[[1e6, 1.0]] * (MOST + 2)]:
        found = window.judge(loss, norm)
        rows.append({"loss": loss, "grad_norm": norm} | ({} if found is None else {"spike": found}))
    rows.insert(5, {"loss": 1.0, "grad_norm": None})
    again = Window(2.0, skip=True)
    for row in json.loads(json.dumps(rows)):
        again.again(row)
    assert again.accepted == window.accepted and again.left_out == window.left_out
    assert len({row["spike"]["skipped"] for row in rows if "spike" in row}) == 2, "one was accepted after MOST in a row"


def poisoned_loss(self: LanguageModeling, outputs: Tensors, batch: Batch) -> Tensor:
    """The loss of a poisoned sample counts a thousand times."""
    losses = self.token_losses(outputs, batch).view(len(batch["samples"]), -1)
    weights = 1.0 + 999.0 * (batch["samples"] == POISONED.get(int(batch["step"]), -1))
    return (losses.sum(1, dtype=torch.float64) * weights).sum() / batch["count"]


def run_poisoned(rank: int, world_size: int, config: TrainConfig) -> list[str]:
    """Digests of all that is updated before and after every step: weights and moments."""
    states: list[str] = []
    with mock.patch.object(LanguageModeling, "loss", poisoned_loss):
        loop = Loop(config, rank)
        plain = loop.trainer.optimizer.start

        def start(*args: Any, **options: Any) -> Tensor:
            states.append(state(loop))
            norm = plain(*args, **options)
            states.append(state(loop))
            return norm

        with mock.patch.object(loop.trainer.optimizer, "start", start):
            loop.run()
    return states


def state(loop: Loop) -> str:
    kept = loop.trainer.optimizer.tensors().values()
    parts = [tensor.numpy().tobytes() for tensors in (*kept, loop.trainer.buffers.params) for tensor in tensors]
    return str(hash(b"".join(parts)))


def config_of(tokens: str, folder: Path, layout: str, **values: Any) -> TrainConfig:
    folder.mkdir(exist_ok=True)
    given: dict[str, Any] = {"run.dir": str(folder), "logger.wandb.mode": "disabled", "train.steps": 17}
    given |= {"run.spike_z": 12.0, "run.on_spike": "skip", "optim.lr": 1e-3}
    return tiny_config(tokens, layout, **given | values)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if "loss" in row]


@pytest.mark.parametrize("layout", ["dp2", pytest.param("tp2pp2", marks=pytest.mark.more)])
def test_the_same_updates_are_left_out_in_every_layout(
    layout: str, pool: WorkerPool, tokens: str, tmp_path: Path
) -> None:
    """Weights and moments keep their bits; the next steps are those of the one-process run."""
    rows = []
    for name, values in (("single", {}), (layout, {"parallel.zero": int("dp" in layout)})):
        config = config_of(tokens, tmp_path / name, name, **values)
        for states in pool.run(run_poisoned, config.parallel.layout.world, config):
            same = [before == after for before, after in zip(states[::2], states[1::2], strict=True)]
            assert [step for step, unchanged in enumerate(same, 1) if unchanged] == list(POISONED)
        rows.append(rows_of(tmp_path / name))
    for one, other in zip(*rows, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-9)
        if one["step"] not in POISONED:
            assert "spike" not in one and "spike" not in other
            continue
        first = 8 * (one["step"] - 1)
        assert one["spike"]["samples"] == other["spike"]["samples"] == [first, first + 7]
        assert one["spike"]["skipped"] and one["spike"]["loss_z"] == pytest.approx(other["spike"]["loss_z"], rel=1e-6)
    assert rows[1][-1]["skipped_steps"] == 2


def test_a_run_that_goes_on_judges_as_if_it_had_not_stopped(pool: WorkerPool, tokens: str, tmp_path: Path) -> None:
    config = config_of(tokens, tmp_path, "dp2", **{"checkpoint.every": 14})
    pool.run(run_poisoned, 2, config)
    rows = rows_of(tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= 14))
    pool.run(run_poisoned, 2, changed(config, {"checkpoint.load": str(tmp_path / "checkpoints" / "step-00000014")}))
    kept = ("step", "loss", "grad_norm", "spike", "skipped_steps")
    one, other = ([{key: row.get(key) for key in kept} for row in of] for of in (rows, rows_of(tmp_path)))
    assert one == other and (one[14]["spike"] or {}).get("skipped")


def test_by_default_a_spike_is_only_logged(tokens: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    states = run_poisoned(0, 1, config_of(tokens, tmp_path, "single", **{"run.on_spike": "log", "train.steps": 14}))
    assert all(before != after for before, after in zip(states[::2], states[1::2], strict=True))
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows if "spike" in row] == [13] and rows[-1]["skipped_steps"] == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "spike" in line)
    assert line.startswith("step     13  spike: robust z of loss ") and line.endswith("samples 96 to 103")
