"""`megapar schedule`: the comparison, the table it writes, and what it says about balance."""

import json
from pathlib import Path

import pytest

from megapar.cli import main
from megapar.schedule.build import generators


def test_all_schedules_are_compared(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert main(["schedule", "stages=4", "microbatches=16", f"out={out}"]) == 0
    text = capsys.readouterr().out
    rows = json.loads(out.read_text())
    assert {row["schedule"] for row in rows} == set(generators())
    by_name = {row["schedule"]: row for row in rows}
    assert by_name["1f1b"]["bubble"] == pytest.approx(3 / 19)
    assert by_name["zbv"]["bubble"] == pytest.approx(1.5 / 49.5)
    assert by_name["1f1b"]["bubble_last_stage_heavier"] - by_name["1f1b"]["bubble"] == pytest.approx(0.149, abs=5e-4)
    assert "1f1b x1          bubble  15.8% ->  30.7%, +14.9 points" in text
    times = [float(line.split()[2]) for line in text.split("\n\n")[0].splitlines()[1:]]
    assert times == sorted(times) and len(times) == len(rows)


def test_what_can_not_be_had_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", "stages=4", "microbatches=4", "memory_limit=3"]) == 0
    text = capsys.readouterr().out
    assert "dualpipe_v     needs at least 2 * 4 ranks = 8 micro-batches, not 4" in text
    over = {line.split()[0] for line in text.splitlines() if line.endswith("over memory_limit")}
    assert "gpipe" in over and "auto" not in over and "v_min" not in over


def test_a_table_is_written_and_read_back(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "a table, with = and spaces.csv"
    sizes = ["stages=2", "microbatches=4"]
    assert main(["schedule", "pipeline.schedule=v_half", *sizes, f"csv={path}"]) == 0
    written = capsys.readouterr().out
    assert path.read_text().startswith("0F0,3F0,3I0,0F1,")
    assert main(["schedule", f"pipeline.schedule=csv:{path}", *sizes]) == 0
    read = capsys.readouterr().out
    assert read.splitlines()[1].split()[-6:] == written.splitlines()[1].split()[-6:]


def test_costs_come_from_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text(json.dumps({name: [0.25] * 8 for name in ("forward", "input_grad", "weight_grad")}))
    sizes = ["pipeline.schedule=interleaved", "stages=2", "microbatches=4"]
    assert main(["schedule", *sizes, f"costs.file={path}"]) == 0
    from_file = capsys.readouterr().out
    assert main(["schedule", *sizes]) == 0
    assert from_file == capsys.readouterr().out  # 8 layers of a quarter on 2 ranks are 1 a rank
    assert main(["schedule", *sizes, f"costs.file={path}", "costs.I=2"]) == 2
    assert "leave out costs.I" in capsys.readouterr().err


def test_costs_of_a_run_are_compared(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Costs of 2 stages say nothing about 4: schedules with two stages a rank are refused, the others are compared."""
    path = tmp_path / "costs.json"
    path.write_text(json.dumps({name: [0.001] * 2 for name in ("forward", "input_grad", "weight_grad")}))
    assert main(["schedule", "stages=2", "microbatches=4", f"costs.file={path}"]) == 0
    text = capsys.readouterr().out
    assert "zbv            costs of 2 parts of the model can't fill 4 stages" in text
    by_name = {line.split()[0]: line.split()[1:4] for line in text.split("\n\n")[0].splitlines()}
    assert by_name["1f1b"] == ["1", "0.01500", "20.0%"]  # (4 + 1) micro-batches of 3 ms
    for chosen in ("stages=4", "pipeline.schedule=zbv"):
        assert main(["schedule", "stages=2", f"costs.file={path}", chosen]) == 2
        assert f"{chosen}: costs of 2 parts" in capsys.readouterr().err
