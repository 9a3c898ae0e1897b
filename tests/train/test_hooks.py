"""Hooks: found by themselves, in a fixed order, nested around a step."""

import io
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megapar.checkpoint import save
from megapar.config.errors import UserError
from megapar.config.keys import changed
from megapar.config.schema import TrainConfig
from megapar.launch.pool import WorkerPool
from megapar.schedule.costs import read_costs
from megapar.train import loop, summary
from megapar.train.hooks import Hook, hook_kinds
from megapar.train.hooks.record import Record
from megapar.train.metrics import MetricsWriter
from megapar.train.trainer import Step, Trainer
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
    names = "FaultInjector Preflight Record NonFinite Spikes Recheck SlowRanks Interpret Replicas Samples Evaluate Save"
    names += " Replicate Trace Rebalance Sample"
    assert [kind.__name__ for kind in kinds] == [*names.split(), "Interrupt"]
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


def run_late(rank: int, world_size: int, config: TrainConfig) -> list[tuple[Any, ...]]:
    """A run whose figures are looked at as on a GPU. What happened in which order, on rank 0."""
    order: list[tuple[Any, ...]] = []
    plain = Record.__init__, Trainer.step, MetricsWriter._write

    def late(self: Record, loop: loop.Loop) -> None:
        plain[0](self, loop)
        self.late = True

    def step(self: Trainer, number: int, *rest: Any) -> Step:
        order.append(("starts", number))
        return plain[1](self, number, *rest)

    def write(self: MetricsWriter, row: Any) -> None:
        order.append(("evaluation" if "val_loss" in row else "row", row["step"]))
        plain[2](self, row)

    patches = (Record, "__init__", late), (Trainer, "step", step), (MetricsWriter, "_write", write)
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(mock.patch.object(*patch))
        run_loop(rank, world_size, config)
    return order


def test_figures_a_step_late_are_the_same(pool: WorkerPool, tokens: str, tmp_path: Path) -> None:
    """A row is written when the next step is under way, but before an evaluation's or a checkpoint of its step."""
    values = {"train.steps": 5, "train.eval_every": 4, "logger.wandb.mode": "disabled"}
    rows = []
    for folder, job in (("plain", run_loop), ("late", run_late)):
        (tmp_path / folder).mkdir()
        config = tiny_config(tokens, "pp2", **values, **{"run.dir": str(tmp_path / folder)})
        order = pool.run(job, 2, config)[0]
        lines = (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        kept = ("step", "loss", "grad_norm", "lr", "skipped_steps", "val_loss")
        rows.append([{key: row[key] for key in kept if key in row} for row in map(json.loads, lines)])
    assert rows[0] == rows[1] and len(rows[0]) == 8
    assert order == [
        ("evaluation", 0), ("starts", 1), ("starts", 2), ("row", 1), ("starts", 3), ("row", 2), ("starts", 4),
        ("row", 3), ("row", 4), ("evaluation", 4), ("starts", 5), ("row", 5), ("evaluation", 5),
    ]  # fmt: skip


def test_skipped_steps_are_counted_over_all_starts(tokens: str, tmp_path: Path) -> None:
    """A checkpoint behind step 3 that two updates were made for."""
    values: dict[str, Any] = {"train.steps": 5, "run.dir": str(tmp_path), "logger.wandb.mode": "disabled"}
    config = tiny_config(tokens, **values)
    trainer = Trainer(config, 0)
    for step in (1, 2):
        trainer.step(step)
    saved = save(tmp_path / "checkpoints", trainer.optimizer, config, 3)
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "loss": 1.0}\n')
    loop.Loop(changed(config, {"checkpoint.load": str(saved)}), 0).run()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("skipped_steps") for row in rows] == [None, 1, 1]
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 3


def test_a_line_on_the_terminal_counts_skipped_steps(tokens: str, tmp_path: Path) -> None:
    values: dict[str, Any] = {"train.steps": 2, "run.dir": str(tmp_path), "logger.wandb.mode": "disabled"}
    shown = io.StringIO()
    writer = MetricsWriter(tiny_config(tokens, **values), shown, 1)
    for step, skipped in ((1, 0), (2, 1)):
        writer.step({"step": step, "loss": 1.0, "tokens_per_s": 10.0, "skipped_steps": skipped})
    writer.close()
    assert shown.getvalue().splitlines() == [
        "step      1  loss 1.0000  10 tokens/s",
        "step      2  loss 1.0000  10 tokens/s  1 skipped",
    ]


def test_a_summary_without_room_for_it_is_shown_all_the_same(
    tokens: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, text: str) -> None:
        raise UserError(f"{path}: can't be written")

    monkeypatch.setattr(summary, "write_atomic", full)
    values: dict[str, Any] = {"train.steps": 2, "run.dir": str(tmp_path), "logger.wandb.mode": "disabled"}
    with pytest.raises(UserError, match=r"summary\.json: can't be written"):
        loop.Loop(tiny_config(tokens, **values), 0).run()
    assert "after 2 steps" in capsys.readouterr().out
