"""What compressed gradients leave to the next step is part of a checkpoint: put back to the bit, or moved whole."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from megapar.checkpoint import load, read_manifest, save
from megapar.config.file import dump
from megapar.config.keys import changed
from megapar.config.schema import TrainConfig
from megapar.launch import resume
from megapar.launch.pool import WorkerPool
from megapar.parallel.boxes import Box, owned_boxes
from megapar.parallel.carried import ERRORS, carried_boxes
from megapar.train.loop import Loop
from megapar.train.rebalance import StageTimes
from megapar.train.trainer import Trainer
from tests.checkpoint import jobs
from tests.tiny import tiny_config

FEEDBACK = ("int8_ef", "powersgd")
FP32 = {"train.dtype": "fp32", "parallel.powersgd_rank": 1, "train.steps": 6}

Boxes = list[tuple[str, Box, np.ndarray]]


@dataclass
class Run:
    """losses: (this rank's part, gradient norm) by step; errors: what this rank counts of the error feedback before the
    first step; first: what it owns of the first step's reduced gradients; kept: whether a gradient is left over, before
    the first step, behind a skipped one and at the end"""

    losses: list[tuple[float, float]] = field(default_factory=list)
    errors: Boxes = field(default_factory=list)
    first: Boxes = field(default_factory=list)
    kept: list[bool] = field(default_factory=list)


def errors_of(trainer: Trainer) -> Boxes:
    """In boxes of the parameters, without the replica."""
    carried, found = trainer.sync.carried(), []
    sizes = [{kind: len(values) for kind, values in kinds.items()} for kinds in carried]
    for one in carried_boxes(trainer.sync, sizes):
        if one.kind in ERRORS and one.counted and trainer.mesh.first_copy:
            skip = int(one.kind == "summand_error")
            box = Box(one.box.offset[skip:], one.box.shape[skip:])
            found.append(
                (one.name, box, carried[one.bucket][one.kind][one.run].view(box.shape).double().numpy().copy())
            )
    return found


def run(
    rank: int,
    world_size: int,
    config: TrainConfig,
    steps: int,
    load_from: str | None = None,
    save_to: str | None = None,
    carries: bool = True,
) -> Run:
    """Load if asked, train up to step `steps`, save if asked. carries: load the error feedback, too"""
    trainer, done, first = Trainer(config, rank), Run(), 1
    if load_from is not None:
        first = 1 + load(load_from, trainer.optimizer, config, sync=trainer.sync if carries else None).step
    done.errors, done.kept = errors_of(trainer), [trainer.sync.leaves_over]
    if trainer.sync.leaves_over:
        trainer.sync.keep_if(torch.tensor([False]))
        done.kept.append(trainer.sync.leaves_over)

    def reduced() -> None:
        for one in owned_boxes(trainer.buffers):
            if one.counted and (trainer.mesh.first_copy if trainer.buffers.zero else trainer.mesh.first_replica):
                done.first.append((one.record.name, one.box, one.view(trainer.sync.owned).double().numpy().copy()))

    for step in range(first, steps + 1):
        figures = trainer.step(step, reduced if step == first else lambda: None)
        done.losses.append((figures.loss, figures.result.grad_norm))
    done.kept.append(trainer.sync.leaves_over)
    if save_to is not None:
        save(Path(save_to), trainer.optimizer, config, steps, sync=trainer.sync)
    trainer.close()
    return done


def total(ranks: list[Boxes]) -> dict[str, np.ndarray]:
    """The sum over ranks and replicas, by parameter."""
    boxes = [one for of_rank in ranks for one in of_rank]
    shapes: dict[str, tuple[int, ...]] = {}
    for name, box, _ in boxes:
        end = tuple(a + b for a, b in zip(box.offset, box.shape, strict=True))
        shapes[name] = tuple(map(max, shapes.get(name, end), end))
    sums = {name: np.zeros(shape) for name, shape in shapes.items()}
    for name, box, values in boxes:
        sums[name][box.within(Box((0,) * len(box.shape), shapes[name]))] += values
    return sums


def config_of(tokens: str, layout: str, method: str, **values: Any) -> TrainConfig:
    return tiny_config(tokens, layout, **FP32 | {"parallel.grad_compression": method} | values)


def go(pool: WorkerPool, config: TrainConfig, steps: int, *paths: Any) -> list[Run]:
    return pool.run(run, config.parallel.layout.world, config, steps, *paths)


SAME = [("tp2dp2", {"parallel.zero": 1, "model.kv_heads": 1}), ("pp2dp2", {"model.tied": True})]


@pytest.mark.more
@pytest.mark.parametrize("method", FEEDBACK)
@pytest.mark.parametrize(("layout", "values"), SAME, ids=["zero", "tied"])
def test_in_the_same_layout_it_goes_on_bit_for_bit(
    method: str, layout: str, values: dict[str, Any], pool: WorkerPool, tokens: str, tmp_path: Path
) -> None:
    config = config_of(tokens, layout, method, **values)
    whole = go(pool, config, 5)
    first = go(pool, config, 2, None, str(tmp_path))
    second = go(pool, config, 5, str(tmp_path))
    assert [a.losses + b.losses for a, b in zip(first, second, strict=True)] == [one.losses for one in whole]
    assert not any(any(one.kept) for one in second)
    without = go(pool, config, 5, str(tmp_path), None, False)
    assert [one.losses for one in without] != [one.losses for one in second]  # and it makes a difference


@pytest.mark.more
@pytest.mark.parametrize(("method", "zero"), [("int8_ef", 0), ("int8_ef", 1), ("powersgd", 1)])
def test_in_another_layout_none_of_it_is_lost(
    method: str, zero: int, pool: WorkerPool, tokens: str, tmp_path: Path
) -> None:
    """Whatever becomes of dp and of the method, the sum over replicas stays, to the rounding of fp32; and it is added
    to the next gradient, once."""
    written = config_of(tokens, "tp2dp2", method, **{"parallel.zero": zero})
    go(pool, written, 2, None, str(tmp_path))
    expected = total([one.errors for one in go(pool, written, 2, str(tmp_path))])
    largest = max(float(np.abs(values).max()) for values in expected.values())
    assert largest > 0
    for layout, other in (("single", "none"), ("dp4", method), ("dp2", "none")):
        config = config_of(tokens, layout, other)
        with_it = go(pool, config, 4, str(tmp_path))
        found = total([one.errors for one in with_it])
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_allclose(found[name], values, rtol=0, atol=1e-6 * largest, err_msg=f"{name} {layout}")
        assert all(one.kept == [True, True, False] for one in with_it), layout
        if other == "none":
            gradients = [
                total([one.first for one in runs])
                for runs in (with_it, go(pool, config, 3, str(tmp_path), None, False))
            ]
            for name, values in expected.items():
                added, scale = gradients[0][name] - gradients[1][name], np.abs(gradients[0][name]).max()
                np.testing.assert_allclose(added, values, rtol=0, atol=2e-6 * scale, err_msg=f"{name} {layout}")


def test_a_checkpoint_without_it_still_loads(pool: WorkerPool, tokens: str, tmp_path: Path) -> None:
    config = config_of(tokens, "dp2", "int8_ef")
    pool.run(jobs.run, 2, config, 2, None, str(tmp_path))
    assert read_manifest(tmp_path / "step-00000002").carried == {}
    assert [len(one.losses) for one in go(pool, config, 3, str(tmp_path))] == [1, 1]


def moving(rank: int, world_size: int, config: TrainConfig) -> None:
    """A run whose layers move to [3, 1] at the first chance."""
    with mock.patch.object(StageTimes, "layers", lambda *given: [3, 1]):
        Loop(config, rank).run()


@pytest.mark.more
@pytest.mark.parametrize("method", ["none", "int8_ef"])
def test_after_layers_have_moved_it_goes_on_bit_for_bit(
    method: str, pool: WorkerPool, tokens: str, tmp_path: Path
) -> None:
    values = {"model.layers": 4, "pipeline.rebalance": 2, "checkpoint.every": 4, "logger.wandb.mode": "disabled"}
    values |= {"run.dir": str(tmp_path / "run"), "logger.progress": False, "optim.clip_grad": 0.01}
    config = config_of(tokens, "pp2dp2", method, **values)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(dump(config))
    pool.run(moving, 4, config)
    rows, files = figures(tmp_path / "run"), state(tmp_path / "run")
    for name in ("checkpoints/step-00000006", "checkpoints/latest", "summary.json"):
        (tmp_path / "run" / name).rename(tmp_path / Path(name).name)
    start = resume.decide(config)
    assert (start.way, start.step, start.partition) == ("on", 4, [3, 1])
    resume.prepare(config, start)
    pool.run(moving, 4, changed(config, {"checkpoint.load": start.load, "pipeline.partition": start.partition}))
    assert figures(tmp_path / "run") == rows and len(rows) == 6
    assert state(tmp_path / "run") == files
    shutil.rmtree(tmp_path / "run")


def figures(folder: Path) -> list[tuple[float, float]]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(row["loss"], row["grad_norm"]) for row in rows if "loss" in row]


def state(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "checkpoints" / "step-00000006").glob("*.safetensors")}
