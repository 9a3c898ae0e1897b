"""An elastic run goes on with the ranks that there are, from where it was, and in its own layout when they are back."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from megapar.config import resolve
from megapar.config.derive import for_ranks
from megapar.config.errors import ConfigError
from megapar.config.keys import changed
from megapar.config.layout import Layout
from megapar.config.schema import TrainConfig
from megapar.launch.watch import read_board
from tests.cli.test_cli_launch import HANG_S, wait_for
from tests.faults.runs import Runs, fault, hydra, trajectory

STEPS = 9


def config_of(layout: str, **values: object) -> TrainConfig:
    sizes = {"model.layers": 4, "model.heads": 4, "model.hidden": 16, "model.vocab_size": 61, "train.device": "cpu"}
    axes = {f"parallel.{name}": size for name, size in Layout.parse(layout).items()}
    return resolve(changed(TrainConfig(), sizes | axes | {"train.global_batch_size": 16, **values}))


@pytest.mark.parametrize(
    ("wanted", "slots", "expected"),
    [
        ("tp2pp2dp2", 8, "tp2pp2dp2"),
        ("tp2pp2dp2", 100, "tp2pp2dp2"),
        ("tp2pp2dp2", 4, "tp2pp2"),  # no more of the model on a rank, and as it was
        ("tp2pp2dp2", 7, "tp2pp3"),  # more ranks before the same division
        ("tp2pp2dp2", 3, "pp3"),  # fewer than the model was divided among: it is divided less
        (
            "dp4",
            3,
            "dp2",
        ),  # three replicas don't divide the batch, and three stages of four layers are no faster than two
        ("pp4dp2", 5, "pp4"),
        ("tp4dp2", 5, "tp4"),
        ("dp4", 2, "dp2"),
        ("tp4", 1, "single"),
    ],
)
def test_the_layout_for_what_is_left(wanted: str, slots: int, expected: str) -> None:
    assert str(for_ranks(config_of(wanted), slots).parallel.layout) == expected


def test_the_partitioner_is_asked_for_another_pipeline() -> None:
    """A list of layers is for the pipeline that it was written for; what stays as long keeps it."""
    config = config_of("pp2dp2", **{"pipeline.partition": [3, 1]})
    assert for_ranks(config, 2).pipeline.partition == [3, 1]
    fewer = for_ranks(config_of("pp4", **{"pipeline.partition": [1, 1, 1, 1]}), 3)
    assert (str(fewer.parallel.layout), fewer.pipeline.partition) == ("pp3", "balanced")


def test_more_ranks_are_not_always_faster() -> None:
    """Seven stages of 32 layers are less even than three, and wait longer for each other."""
    config = config_of("tp8pp2dp4", **{"model.layers": 32, "model.heads": 16, "model.hidden": 64})
    assert str(for_ranks(config, 63).parallel.layout) == "tp8pp3dp2"


def test_a_number_of_none_is_not_no_number() -> None:
    config = changed(config_of("dp2"), {"run.elastic": True, "run.slots_file": "slots"})
    with pytest.raises(ConfigError, match=r"run\.slots_file=slots: leaves 0 ranks; give 1 or more"):
        resolve(config, slots=0)
    assert resolve(config, slots=1).parallel.dp == 1 and resolve(config).parallel.dp == 2


@pytest.mark.more
def test_where_no_rank_may_run_it_stops(tokens: str, tmp_path: Path) -> None:
    """With a checkpoint and the exit code of a run that was asked to; the same command goes on."""
    runs = Runs(tmp_path, tokens, ["parallel=dp2", "train.steps=5"])
    slots, folder = tmp_path / "slots", tmp_path / "run"
    slots.write_text("2")
    elastic = ["run.elastic=true", f"run.slots_file={slots}", "checkpoint.every=0"]

    def change() -> None:
        wait_for(lambda: min((one.step for one in read_board(folder)), default=0) >= 2, HANG_S)
        slots.write_text("0")

    with meanwhile(change):
        code, said = runs.start("run", f"fault.plan={hydra([fault(0, 2, 'opt', 'delay', seconds=2.0)])}", *elastic)
    assert code == 85, said
    slots.write_text("2")
    assert runs.start("run", *elastic)[0] == 0
    runs.compare(folder)


@pytest.mark.more
def test_what_is_in_memory_is_not_lost_where_no_rank_may_run(tokens: str, tmp_path: Path) -> None:
    """A rank dies, and the slots are written anew, first with what is no number: the run waits for one. It is 0."""
    runs = Runs(tmp_path, tokens, ["parallel=dp2", "train.steps=5"])
    slots, folder = tmp_path / "slots", tmp_path / "run"
    slots.write_text("2")
    elastic = ["run.elastic=true", f"run.slots_file={slots}", "checkpoint.every=0", "checkpoint.replicate=true"]
    plan = [fault(0, 3, "fwd", "delay", seconds=2.0), fault(1, 3, "bwd", "sigkill")]

    def change() -> None:
        wait_for(lambda: min((one.step for one in read_board(folder)), default=0) >= 3, HANG_S)
        slots.write_text("two")
        wait_for(lambda: (folder / "restarts.jsonl").exists() or not read_board(folder), HANG_S)
        time.sleep(1.0)
        slots.write_text("0")

    with meanwhile(change):
        code, said = runs.start("run", f"fault.plan={hydra(plan)}", "run.max_restarts=1", *elastic)
    assert code == 85 and "run.slots_file: no rank may run" in said, said
    assert any("not a whole number" in line and "waiting for it" in line for line in said), said
    assert f"run: {folder}/checkpoints/step-00000002 has the state that was in memory" in said, said
    assert said[-2] == "interrupted" and said[-1].startswith("megapar train "), said
    assert runs.start("none", *elastic)[0] == 85  # from the first
    slots.write_text("2")
    code, said = runs.start("run", *elastic)
    assert code == 0 and any("goes on from step 2 of 5" in line for line in said), said
    runs.compare(folder)


def test_no_ranks_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"run\.slots_file=null: leaves 0 ranks; give 1 or more"):
        for_ranks(config_of("dp2"), 0)


@contextmanager
def meanwhile(work: Callable[[], None]) -> Iterator[None]:
    """Do something beside what runs inside."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    yield
    thread.join(HANG_S)


@pytest.mark.more
def test_ranks_go_and_come_back(tokens: str, tmp_path: Path) -> None:
    """pp2dp2, then pp2 where two slots are left, then pp2dp2 again: every step once, and the losses of the whole run to
    rounding, which sums over another number of replicas differ by."""
    runs = Runs(tmp_path, tokens, ["parallel=pp2dp2", f"train.steps={STEPS}", "train.dtype=fp64"])
    slots, folder = tmp_path / "slots", tmp_path / "run"
    slots.write_text("4\n")
    held = hydra([fault(0, step, "opt", "delay", seconds=2.0) for step in (3, 6)])

    def there(ranks: int, step: int) -> bool:
        now = read_board(folder)
        return len(now) == ranks and all(one.step >= step for one in now)

    def change() -> None:
        for step, ranks, count in ((3, 4, "2\n"), (6, 2, "4\n")):
            wait_for(partial(there, ranks, step), HANG_S)
            slots.write_text(count)

    with meanwhile(change):
        code, said = runs.start("run", f"fault.plan={held}", "run.elastic=true", f"run.slots_file={slots}")
    assert code == 0, said
    layouts = [line.partition("layout ")[2].partition(",")[0] for line in said if ", layout " in line]
    assert layouts == ["pp2dp2", "pp2", "pp2dp2"], said
    rows, clean = trajectory(folder), trajectory(runs.clean)
    assert [step for step, _ in rows] == list(range(1, STEPS + 1))
    for (_, (samples, *figures)), (_, (others, *expected)) in zip(rows, clean, strict=True):
        assert samples == others
        assert [float.fromhex(x) for x in figures] == pytest.approx([float.fromhex(x) for x in expected], rel=1e-9)
    assert json.loads((folder / "summary.json").read_text())["steps"] == STEPS


@pytest.mark.more
def test_a_rank_that_is_gone_for_good(tokens: str, tmp_path: Path) -> None:
    """A rank dies, and fewer may run from then on: the restart takes the layout for these."""
    runs = Runs(tmp_path, tokens, ["parallel=dp4", "train.steps=5", "train.dtype=fp64", "train.micro_batch_size=1"])
    slots = tmp_path / "slots"
    slots.write_text("4")

    def change() -> None:
        wait_for(lambda: (tmp_path / "run/restarts.jsonl").exists(), HANG_S)
        slots.write_text("2")

    plan = hydra([fault(2, 3, "bwd", "sigkill"), fault(0, 3, "opt", "delay", seconds=2.0)])
    with meanwhile(change):
        elastic = ["run.elastic=true", f"run.slots_file={slots}", "run.max_restarts=1"]
        code, said = runs.start("run", f"fault.plan={plan}", *elastic)
    assert code == 0, said
    layouts = [line.partition("layout ")[2].partition(",")[0] for line in said if ", layout " in line]
    assert layouts[0] == "dp4" and layouts[-1] == "dp2", said
    assert [step for step, _ in trajectory(tmp_path / "run")] == [1, 2, 3, 4, 5]
