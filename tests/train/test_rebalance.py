"""Layers move to where they are faster while a run goes on, and the run computes the same."""

import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megapar.config.schema import TrainConfig
from megapar.launch.pool import WorkerPool
from megapar.mesh import Mesh
from megapar.models.layer import TransformerLayer
from megapar.schedule.partition import rebalanced
from megapar.trace.spans import LAYERS, Span, layers_of
from megapar.train.loop import Loop
from megapar.train.rebalance import StageTimes
from tests.tiny import tiny_config
from tests.virtual_time import VirtualClock


def test_times_decide() -> None:
    # A device of a third of the others' speed: one layer takes what three take there.
    assert rebalanced([4, 4, 3], [3.0, 1.0, 1.0], [0.0, 0.0, 0.0]) == [1, 5, 5]
    # A head of two layers.
    assert rebalanced([4, 4], [1.0, 1.0], [0.0, 2.0]) == [5, 3]
    # An embedding of two layers on the first of three.
    assert rebalanced([4, 4, 4], [1.0, 1.0, 1.0], [2.0, 0.0, 0.0]) == [3, 5, 4]
    # 2 % is noise.
    assert rebalanced([50, 50], [1.0, 1.0], [0.0, 2.0]) == [50, 50]


def span(kind: str, name: str, seconds: float) -> Span:
    return Span(kind, name, 0.0, seconds)


def test_what_layers_take_and_what_the_rest_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage 0: two layers in 20 of 30 ms forward; stage 1, split backward: four in 20 of 40 ms."""
    times, found = StageTimes(), []

    def keep(*given: list[float]) -> list[int]:
        found.append(given)
        return [3, 3]

    monkeypatch.setattr("megapar.train.rebalance.rebalanced", keep)
    forward = [span(LAYERS, layers_of(0), 0.02), span("F", "0F0", 0.03)]
    times.add([*forward, span("B", "0B0", 0.06), span("tp", "all_reduce", 9.0)])
    for m, input_grad in enumerate((0.03, 0.03, 7.0)):
        forward = [span(LAYERS, layers_of(1), 0.02), span("F", f"1F{m}", 0.04)]
        times.add([*forward, span("I", f"1I{m}", input_grad), span("W", f"1W{m}", 0.01)])
    assert times.layers([2, 4], Mesh()) == [3, 3]
    [(counts, layer, rest)] = found
    assert counts == [2, 4]
    assert layer == pytest.approx([0.03, 0.01]) and rest == pytest.approx([0.03, 0.04])


def run_with_a_slow_device(
    rank: int, world_size: int, config: TrainConfig, seconds: list[float], virtual: bool
) -> None:
    """seconds: how much longer a layer's forward takes on each rank"""
    plain = TransformerLayer.forward

    def slowed(self: TransformerLayer, *args: Any) -> Any:
        time.sleep(seconds[rank])
        return plain(self, *args)

    clock = VirtualClock().running() if virtual else nullcontext()
    with mock.patch.object(TransformerLayer, "forward", slowed), clock:
        Loop(config, rank).run()


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def moves(
    pool: WorkerPool, tokens: str, folder: Path, schedule: str, seconds: list[float], virtual: bool
) -> list[list[int]]:
    """Where six layers moved to in five steps, after a comparison with a run in which they stay."""
    found = {}
    for name, every in (("fixed", 0), ("moved", 2)):
        (folder / name).mkdir()
        values = {"model.layers": 6, "pipeline.schedule": schedule, "pipeline.rebalance": every, "train.steps": 5}
        values |= {"run.dir": str(folder / name), "logger.wandb.mode": "disabled", "logger.progress": False}
        pool.run(run_with_a_slow_device, 2, tiny_config(tokens, "pp2", **values), seconds, virtual)
        found[name] = rows_of(folder / name)
    losses = {name: [row["loss"] for row in rows if "loss" in row] for name, rows in found.items()}
    # fp64: the gradient norm's sum over parameters is taken in another order
    assert losses["moved"] == pytest.approx(losses["fixed"], rel=1e-11)
    assert len(losses["moved"]) == 5
    return [row["partition"] for row in found["moved"] if "partition" in row]


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved"])
def test_a_slow_device_gets_fewer_layers(schedule: str, pool: WorkerPool, tokens: str, tmp_path: Path) -> None:
    """A layer takes 1 s on one device and 2 s on the other, by a clock that nothing else moves: 4 and 2 layers. They
    stay there, as they are balanced then."""
    [moved] = moves(pool, tokens, tmp_path, schedule, [1.0, 2.0], virtual=True)
    assert (sum(moved[0::2]), sum(moved[1::2])) == (4, 2)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved"])
def test_a_slow_device_gets_fewer_layers_by_the_wall_clock(
    schedule: str, pool: WorkerPool, tokens: str, tmp_path: Path
) -> None:
    """Forward takes 10 ms more a layer on one of two devices, which is most of a layer's time in this tiny model."""
    found = moves(pool, tokens, tmp_path, schedule, [0.0, 0.01], virtual=False)
    assert found, "no layer moved"
    on_slow_device = sum(found[0][1::2])
    assert sum(found[0]) == 6 and on_slow_device <= 2
