"""A bit that flips in memory or in a matmul, or a gradient that is no number: found, named, and the run goes on."""

import json
from pathlib import Path

import pytest

from megapar.cli import main
from tests.faults.runs import Runs, causes, fault


@pytest.fixture(scope="module")
def runs(tokens: str, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    overrides = ["parallel=dp2", "train.steps=6", "run.replicas_every=1", "run.recheck_every=1"]
    return Runs(tmp_path_factory.mktemp("bits"), tokens, overrides)


def rows(folder: Path, key: str) -> dict[int, object]:
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row[key] for row in found if key in row}


@pytest.mark.more
@pytest.mark.parametrize(("kind", "phase"), [("flip_memory", "opt"), ("flip_message", "bwd")])
def test_a_bit_of_a_weight_or_of_a_reduced_gradient(kind: str, phase: str, runs: Runs) -> None:
    """Of one of two copies: which is wrong can't be told, but that they differ; the run goes back to its last state."""
    [line] = causes(runs.with_faults(kind, [fault(1, 3, phase, kind)]))
    assert line.startswith("step 3: copies of a parameter differ: ") and "test that machine" in line


@pytest.mark.more
def test_a_bit_of_a_weight_that_the_next_update_overwrites(tokens: str, tmp_path: Path) -> None:
    """With ZeRO-1 each rank gets most of its weights anew in every step; gradients of the others are not used."""
    runs = Runs(tmp_path, tokens, ["parallel=dp2", "parallel.zero=1", "train.steps=5", "run.replicas_every=1"])
    [line] = causes(runs.with_faults("zero", [fault(1, 3, "data", "flip_memory")]))
    assert line.startswith("step 3: copies of a parameter differ: ")


@pytest.mark.more
def test_a_bit_of_a_file(runs: Runs) -> None:
    """Of the newest checkpoint, before a rank dies: the run goes on from the one before it, and says what was wrong."""
    said = runs.with_faults("file", [fault(1, 4, "fwd", "flip_file"), fault(1, 4, "bwd", "sigkill")])
    assert len(causes(said)) == 1
    assert any("step-00000003/rank-" in line and "changed, its SHA-256 is not the one" in line for line in said), said
    assert any("goes on from step 2 of 6" in line for line in said), said


@pytest.mark.more
def test_a_bit_of_a_matmul(runs: Runs) -> None:
    """The step is computed again at once: no restart, and the rank and the place are in its row."""
    said = runs.with_faults("matmul", [fault(1, 4, "fwd", "flip_matmul")])
    assert not causes(said)
    found = rows(runs.folder / "matmul", "recheck")
    assert list(found) == [4] and "1" in json.dumps(found[4]), found


@pytest.mark.more
def test_a_gradient_that_is_no_number(runs: Runs) -> None:
    """Every rank leaves the step out, and the next ones go on from the same state."""
    folder = runs.folder / "nan"
    plan = "fault.plan=[{rank: 1, step: 3, phase: opt, kind: nonfinite}]"
    assert main([*runs.words, f"run.dir={folder}", plan]) == 0
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped_steps"] for row in steps if "loss" in row] == [0, 0, 1, 1, 1, 1]
    assert rows(folder, "nonfinite").keys() == {3}
