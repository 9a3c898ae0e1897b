"""Block sizes: every alternative compiles for sm_90 and is right in the interpreter; winners go into the tables."""

import ast
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.gpu import pin, tune
from experiments.gpu.alternatives import MOST, alternatives, rows
from megapar.kernels.matmul import Config
from tests.gpu.statements import FOLDER


def test_every_row_has_three_to_six_alternatives() -> None:
    assert {row.key[0] for row in rows()} >= {"forward", "dkdv", "dq", "sm_90"}
    for row in rows():
        assert 3 <= len(set(alternatives(row))) <= MOST and row.config not in alternatives(row), row.name


def rehearse(only: str, folder: Path) -> list[dict]:
    command = [sys.executable, str(FOLDER / "tune.py"), "--out", str(folder), "--device", "cpu"]
    done = subprocess.run(
        [*command, "--only", only, "--seconds", "3000"], cwd=folder, capture_output=True, text=True, timeout=3600
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((folder / "tune.json").read_text())["found"]


@pytest.mark.parametrize(
    "only",
    [
        "matmul sm_90 4",
        pytest.param("attention forward fp32 32", marks=pytest.mark.more),
        pytest.param("", marks=pytest.mark.slow),
    ],
)
def test_alternatives_compile_and_are_right(only: str, tmp_path: Path) -> None:
    found = rehearse(only, tmp_path)
    assert {one["row"] for one in found} == {row.name for row in rows() if only in row.name}
    for one in found:
        assert one["fits"] and one["ok"], one
        assert one["ms"] is None and one["kind"] == "rehearsed"
    assert tune.winners(found) == {}


def timed(row: str, warps: int, ms: float, ok: bool = True) -> dict:
    return {"row": row, "config": {"warps": warps}, "kind": "measured", "ok": ok, "ms": ms}


def test_the_row_that_is_there_stays_unless_another_is_clearly_faster() -> None:
    found = [
        timed("a", 4, 1.0),
        timed("a", 8, 0.995),
        timed("b", 4, 1.0),
        timed("b", 8, 0.9),
        timed("b", 2, 0.8, False),
    ]
    best = tune.winners(found)
    assert best["a"]["config"] == {"warps": 4} and best["b"]["config"] == {"warps": 8}


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.name)
def test_a_winner_goes_to_its_row_and_nowhere_else(row) -> None:
    text = Path(str(row.table.__file__)).read_text()
    config = replace(row.config, warps=2 * row.config.warps, source='NVIDIA H100 80GB HBM3, triton 3.6.0, "2026-11-29"')
    new = pin.pinned(text, row.key, row.place, config)
    names = {"Config": type(row.config)}
    before, after = (ast.unparse(pin.row_of(ast.parse(x), row.key, row.place)) for x in (text, new))
    assert eval(before, names) == row.config and eval(after, names) == config
    assert "H100" in eval(after, names).source
    assert ast.unparse(ast.parse(new)).replace(after, before) == ast.unparse(ast.parse(text))
    ruff = [str(Path(sys.executable).with_name("ruff")), "format", "--diff", "-"]
    assert subprocess.run(ruff, input=new, capture_output=True, text=True).returncode == 0


def test_a_row_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="no row"):
        pin.pinned("CONFIGS = {}\n", ("sm_90", 2), 0, Config(64, 64, 32, 4, 3))


def test_a_rehearsal_has_no_winners(tmp_path: Path) -> None:
    (tmp_path / "tune.json").write_text(json.dumps({"found": [], "versions": {}, "card": "cpu", "date": ""}))
    with pytest.raises(ValueError, match="no card has timed anything"):
        tune.pin(tmp_path / "tune.json")
