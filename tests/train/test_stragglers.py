"""Slow ranks: named soon, never by noise, never because their stage has more to do."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from megapar.config.layout import RANK_ORDER, Layout
from megapar.config.schema import TrainConfig
from megapar.launch.pool import WorkerPool
from megapar.train import metrics
from megapar.train.loop import Loop
from megapar.train.stragglers import SLOW_BY_ESTIMATE, WINDOW, Stragglers
from megapar.train.summary import _time_lines
from tests.tiny import tiny_config


def seconds_of(layout: Layout, costs: list[float], random: np.random.Generator, noise: float) -> torch.Tensor:
    """A synthetic step: what stages cost, with log-normal noise, and now and then a hiccup."""
    shape = [layout[name] for name in RANK_ORDER]
    values = np.array(costs).reshape(-1, 1, 1) * np.exp(random.normal(0, noise, shape))
    return torch.from_numpy(values * np.where(random.random(shape) < 0.02, 5.0, 1.0))


@pytest.mark.parametrize("layout", ["dp2", "dp4", "tp2", "tp4pp2", "tp2pp2dp2", "pp4"])
def test_noise_names_none_and_a_slow_rank_is_named(layout: str) -> None:
    """200 clean steps of an uneven pipeline, then a rank that takes twice as long: it alone is named, in 20 steps."""
    ranks, random = Layout.parse(layout), np.random.default_rng(0)
    costs = [1.0 + number for number in range(ranks["pp"])]
    watch = Stragglers(costs, measured=True)
    assert [watch.slow(seconds_of(ranks, costs, random, 0.15)) for _ in range(200)] == [[]] * 200
    slow = ranks.world - 1
    named = []
    for _ in range(20):
        seconds = seconds_of(ranks, costs, random, 0.15)
        seconds.view(-1)[slow] *= 2
        named.append(watch.slow(seconds))
    assert named[-1] == [slow] and all(one in ([], [slow]) for one in named)


def test_estimated_costs_have_more_room() -> None:
    """A stage without floating-point operations to speak of, such as an embedding's, still takes time."""
    watch, exact = Stragglers([1.0, 1.0], measured=False), Stragglers([1.0, 1.0], measured=True)
    seconds = torch.tensor([1.0, 2.0]).double().view(2, 1, 1)
    assert [watch.slow(seconds) for _ in range(WINDOW)] == [[]] * WINDOW
    assert [exact.slow(seconds) for _ in range(WINDOW)][-1] == [1]
    seconds = torch.tensor([1.0, SLOW_BY_ESTIMATE]).double().view(2, 1, 1)
    assert [watch.slow(seconds) for _ in range(WINDOW)][-1] == [1]


def run_slow(rank: int, world_size: int, config: TrainConfig) -> None:
    """In which rank 1 says that it has computed for 10 seconds more in every step."""
    plain = metrics.local_figures

    def local_figures(*given: Any) -> list[float]:
        figures = plain(*given)
        figures[metrics._COLUMNS.index("busy")] += 10.0 * (rank == 1)
        return figures

    names = {"megapar.train.stragglers.WINDOW": 3, "megapar.train.hooks.record.local_figures": local_figures}
    with ExitStack() as stack:
        for name, value in names.items():
            stack.enter_context(mock.patch(name, value))
        Loop(config, rank).run()


def test_rows_and_summary_name_it(pool: WorkerPool, tokens: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"run.dir": str(tmp_path), "logger.wandb.mode": "disabled", "train.steps": 4}
    config = tiny_config(tokens, "dp2", **given)
    pool.run(run_slow, 2, config)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("stragglers") for row in rows] == [None, None, [1], [1]]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["stragglers"] == {"1": 0.5}
    assert "slow ranks  rank 1 in 50% of steps" in _time_lines(summary, config)
