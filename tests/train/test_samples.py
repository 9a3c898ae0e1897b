"""Samples that several ranks read: another token is found within the step, and named; a row has a hash of them all."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megapar.config.errors import UserError
from megapar.config.schema import TrainConfig
from megapar.launch.pool import WorkerPool
from megapar.pipeline.stage import Batch
from megapar.train.loop import Loop
from tests.tiny import tiny_config


def config_of(tokens: str, folder: Path, layout: str, **values: Any) -> TrainConfig:
    (folder / layout).mkdir(parents=True)
    given: dict[str, Any] = {"run.dir": str(folder / layout), "logger.wandb.mode": "disabled", "train.steps": 3}
    return tiny_config(tokens, layout, **given | {"run.samples_every": 1} | values)


def run_changed(rank: int, world_size: int, config: TrainConfig, name: str, on: int) -> str | None:
    """The error that ends a run whose step 2 has one other value in a tensor on a rank, if it ends with one."""
    loop = Loop(config, rank)
    plain = loop.trainer.task.batches

    def batches(step: int) -> list[Batch]:
        found = plain(step)
        if step == 2 and rank == on:
            found[-1] = found[-1] | {name: found[-1][name].clone()}
            found[-1][name][-1, -1] -= 1
        return found

    try:
        with mock.patch.object(loop.trainer.task, "batches", batches):
            loop.run()
    except UserError as error:
        return str(error)
    return None


def hashes(folder: Path) -> list[str]:
    return [json.loads(line)["samples"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("layout", "name", "on", "text"),
    [
        ("tp2", "labels", 1, "labels differs between ranks 0, 1, with no majority"),
        ("tp2pp2", "ids", 3, "ids on rank 3 differs from that on ranks 0, 1, 2"),
        pytest.param("pp2dp2", "ids", 2, "ids differs between ranks 0, 2, with no majority", marks=pytest.mark.more),
    ],
)
def test_another_token_is_named(
    layout: str, name: str, on: int, text: str, pool: WorkerPool, tokens: str, tmp_path: Path
) -> None:
    """Before the update: what the step would have done to the weights is left undone."""
    config = config_of(tokens, tmp_path, layout)
    said = pool.run(run_changed, config.parallel.layout.world, config, name, on)
    assert len(set(said)) == 1 and said[0] is not None and "\n" not in said[0]
    assert said[0].startswith(f"step 2: ranks that share samples have read others: {text}; compare the files of data")
    assert len(hashes(tmp_path / layout)) == 1


def test_the_hash_is_of_samples_alone(pool: WorkerPool, tokens: str, tmp_path: Path) -> None:
    """Whatever the layout; another order of samples is another hash."""
    found = []
    for layout in ("single", "tp2", "pp2", "dp2", "tp2dp2"):
        config = config_of(tokens, tmp_path, layout)
        assert set(pool.run(run_changed, config.parallel.layout.world, config, "", -1)) == {None}
        found.append(hashes(tmp_path / layout))
    assert found == [found[0]] * 5 and len(set(found[0])) == 3
    other = config_of(tokens, tmp_path / "other", "dp2", **{"train.seed": 9})
    assert set(pool.run(run_changed, 2, other, "", -1)) == {None}
    assert not set(hashes(tmp_path / "other/dp2")) & set(found[0])
