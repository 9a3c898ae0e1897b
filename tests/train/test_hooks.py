"""Hooks: found by themselves, in a fixed order, nested around a step."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megapar.config.schema import TrainConfig
from megapar.launch.pool import WorkerPool
from megapar.schedule.costs import read_costs
from megapar.train import loop
from megapar.train.hooks import Hook, hook_kinds
from megapar.train.trainer import Step
from tests.tiny import tiny_config

seen: list[tuple[Any, ...]] = []


class Outer(Hook):
    order = 100

    def start(self) -> None:
        seen.append(("start", self.order))

    def before(self, step: int) -> None:
        seen.append(("before", self.order, step))

    def on_reduced(self, step: int) -> None:
        norm = torch.cat(self.loop.trainer.sync.owned).norm().item()
        seen.append(("reduced", self.order, step, norm))

    def after(self, step: int, done: Step) -> None:
        seen.append(("after", self.order, step, done.result.grad_norm))

    def finish(self) -> dict[str, Any]:
        return {f"from {self.order}": len(seen)}


class Inner(Outer):
    order = 1


def run_loop(rank: int, world_size: int, config: TrainConfig) -> None:
    loop.Loop(config, rank).run()


@pytest.mark.parametrize("partition", [[0, 2], [2, 0]])
def test_a_run_with_an_empty_stage_leaves_everything(
    partition: list[int], pool: WorkerPool, tokens: str, tmp_path: Path
) -> None:
    """A stage with the embedding or the head alone: trace, costs by layer and summary are there, too."""
    values: dict[str, Any] = {"pipeline.partition": partition, "run.dir": str(tmp_path), "train.steps": 2}
    pool.run(run_loop, 2, tiny_config(tokens, "pp2", **values, **{"logger.wandb.mode": "disabled"}))
    costs = read_costs(str(tmp_path / "costs.json"), 2)
    assert costs.stages == 2 and min(costs.forward) > 0
    assert (tmp_path / "trace.json").exists()
    assert json.loads((tmp_path / "summary.json").read_text())["layers_per_stage"] == partition


def test_every_hook_is_found_and_has_its_own_place() -> None:
    kinds = hook_kinds()
    assert [kind.__name__ for kind in kinds] == ["Record", "Evaluate", "Save", "Trace", "Rebalance", "Sample"]
    assert len({kind.order for kind in kinds}) == len(kinds)


def test_hooks_nest_around_a_step(tokens: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are whole and unclipped in `on_reduced`; what `finish` returns is in the summary."""
    seen.clear()
    values: dict[str, Any] = {"train.steps": 2, "run.dir": str(tmp_path), "logger.wandb.mode": "disabled"}
    values |= {"optim.clip_grad": 1e-3}
    kinds: list[type[Hook]] = [Inner, *hook_kinds(), Outer]
    monkeypatch.setattr(loop, "hook_kinds", lambda: kinds)
    loop.Loop(tiny_config(tokens, **values), 0).run()
    events = [event[:3] for event in seen]
    steps = [
        [
            ("before", 100, n),
            ("before", 1, n),
            ("reduced", 1, n),
            ("reduced", 100, n),
            ("after", 1, n),
            ("after", 100, n),
        ]
        for n in (1, 2)
    ]
    assert events == [("start", 1), ("start", 100), *steps[0], *steps[1]]
    norms = {event[2]: event[3] for event in seen if event[0] == "reduced"}
    for event in seen:
        if event[0] == "after":
            assert norms[event[2]] == pytest.approx(event[3], rel=1e-12) and event[3] > 1e-3
    assert '"from 100": 14' in (tmp_path / "summary.json").read_text()
