"""Gradients that are not finite: no rank updates, the parameter and the rank that it began on are named."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megapar.config.errors import UserError
from megapar.config.schema import TrainConfig
from megapar.launch.pool import WorkerPool
from megapar.parallel.weight_grad import Submitted, WeightGrads
from megapar.train.loop import Loop
from megapar.train.trainer import Step, Trainer
from tests.tiny import tiny_config

RANK, VALUES = 1, 3  # who has how many values that are not finite
NAME = "layers.1.mlp.down.weight"


@contextmanager
def poisoned(rank: int, steps: list[int], times: int) -> Iterator[None]:
    """In these steps NaN is in the gradient of NAME on RANK, as often as it is computed up to `times`."""
    plain, now, left = (WeightGrads._run, Trainer.step), [0], dict.fromkeys(steps, times)

    def run(self: WeightGrads, submitted: Submitted) -> None:
        for parameter in submitted.parameters:
            if rank == RANK and NAME in parameter.name and left.get(now[0], 0) > 0:
                left[now[0]] -= 1
                plain[0](self, submitted)
                parameter.grad.view(-1)[:VALUES] = torch.nan
                return
        plain[0](self, submitted)

    def step(self: Trainer, number: int, *rest: Any) -> Step:
        now[0] = number
        return plain[1](self, number, *rest)

    with mock.patch.object(WeightGrads, "_run", run), mock.patch.object(Trainer, "step", step):
        yield


def run_poisoned(rank: int, world_size: int, config: TrainConfig, steps: list[int], times: int) -> Any:
    """The error that ends the run, as (class, kind, text); None if it doesn't."""
    with poisoned(rank, steps, times):
        try:
            Loop(config, rank).run()
        except UserError as error:
            return type(error).__name__, getattr(error, "kind", None), str(error)
    return None


def config_of(tokens: str, folder: Path, layout: str, **values: Any) -> TrainConfig:
    given: dict[str, Any] = {"run.dir": str(folder), "logger.wandb.mode": "disabled", "train.steps": 3}
    return tiny_config(tokens, layout, **given | values)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if "loss" in row]


@pytest.mark.parametrize(
    ("layout", "values"),
    [("tp2", {}), ("dp2", {}), ("dp2", {"parallel.zero": 1}), ("tp2dp2", {}), ("pp2", {})],
    ids=["tp2", "dp2", "dp2zero1", "tp2dp2", "pp2"],
)
def test_rank_and_parameter_are_named(
    layout: str, values: dict[str, Any], pool: WorkerPool, tokens: str, tmp_path: Path
) -> None:
    """Also where the sum over dp has brought it to every rank."""
    config = config_of(tokens, tmp_path, layout, **values)
    assert (
        pool.run(run_poisoned, config.parallel.layout.world, config, [2], 100) == [None] * config.parallel.layout.world
    )
    rows = rows_of(tmp_path)
    assert [row.get("nonfinite") for row in rows] == [None, {"parameter": NAME, "ranks": [RANK], "count": VALUES}, None]
    assert [row["skipped_steps"] for row in rows] == [0, 1, 1]


def test_what_does_not_come_again_is_named_with_all_ranks_of_the_sum(
    pool: WorkerPool, tokens: str, tmp_path: Path
) -> None:
    config = config_of(tokens, tmp_path, "dp2")
    assert pool.run(run_poisoned, 2, config, [2], 1) == [None, None]
    assert rows_of(tmp_path)[1]["nonfinite"] == {"parameter": NAME, "ranks": [0, 1], "count": VALUES}


def test_a_line_on_the_terminal_names_it(
    tokens: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "RANK", 0)
    assert run_poisoned(0, 1, config_of(tokens, tmp_path, "single"), [2], 1) is None
    line = f"step      2  skipped: rank 0 has 3 non-finite values in the gradient of {NAME}"
    assert line in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("policy", ["stop", "rollback"])
def test_too_many_in_a_row_end_the_run(policy: str, pool: WorkerPool, tokens: str, tmp_path: Path) -> None:
    """Steps 1 and 3 to 4 are skipped: step 2 has begun a new row."""
    values = {"run.nonfinite_limit": 2, "run.on_nonfinite": policy, "train.steps": 6}
    config = config_of(tokens, tmp_path, "dp2", **values)
    said = pool.run(run_poisoned, 2, config, [1, 3, 4, 5], 100)
    assert said[0] == said[1]
    name, kind, text = said[0]
    assert (name, kind) == {"stop": ("UserError", None), "rollback": ("RollBack", "rollback")}[policy]
    begins = "step 4: 2 steps in a row skipped, as gradients were not finite (rank 1 has 3 non-finite values in the"
    assert text.startswith(f"{begins} gradient of {NAME}); ")
    assert ("checkpoint.load=" in text) == (policy == "stop") and "\n" not in text
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3]


def test_a_norm_too_large_for_its_dtype_ends_the_run_too(pool: WorkerPool, tokens: str, tmp_path: Path) -> None:
    values: dict[str, Any] = {"optim.lr": 1e300, "optim.weight_decay": 0.0, "run.nonfinite_limit": 3}
    config = config_of(tokens, tmp_path, "pp2", **values, **{"train.steps": 20})
    said = pool.run(run_poisoned, 2, config, [], 0)
    assert said[0] == said[1] and "3 steps in a row skipped" in said[0][2]
