"""The acceptance without a GPU: all of it runs, nothing is wrong, and no figure is claimed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.gpu.section import find
from experiments.gpu.table import KINDS
from tests.gpu.conftest import EARLIER, Accept, Outcome
from tests.gpu.statements import ROOT, report

KEYS = ["section", "check", "ok", "value", "unit", "floor", "floor_met", "kind", "device", "versions", "note"]
TIMED = ("TFLOP/s", "GB/s", "tokens/s", "ms", "ms a step", "x", "GB", "of 989 TFLOP/s", "launches")


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("notes") / "statements"


@pytest.fixture(scope="module")
def rehearsal(accept: Accept, notes: Path) -> Outcome:
    return accept("--seconds", "900", MEGAPAR_STATEMENTS=str(notes))


@pytest.mark.slow
def test_every_section_runs_and_nothing_is_wrong(rehearsal: Outcome) -> None:
    sections, broken = find()
    assert not broken
    assert rehearsal.code == 0 and rehearsal.wrong() == [], rehearsal.said[-3000:]
    assert {row["section"] for row in rehearsal.rows} == {*sections, "accept"}


@pytest.mark.slow
def test_rows_have_one_shape(rehearsal: Outcome) -> None:
    for row in rehearsal.rows:
        keys = sorted([*KEYS, "reason"] if row["kind"] == "skipped" else KEYS)
        assert sorted(row) == keys and row["kind"] in KINDS
        assert (row["ok"] is None) == (row["kind"] == "skipped") == bool(row.get("reason"))
        assert row["device"] == "cpu" and {"torch", "triton", "python", "megapar"} == set(row["versions"])


@pytest.mark.slow
def test_no_figure_of_a_cpu_is_a_time(rehearsal: Outcome) -> None:
    assert {row["kind"] for row in rehearsal.rows} == {"rehearsed", "static", "skipped"}
    assert all(row["floor_met"] is None for row in rehearsal.rows)
    timed = [row for row in rehearsal.rows if row["unit"] in TIMED]
    assert len(timed) > 50 and all(row["value"] is None for row in timed)


@pytest.mark.slow
def test_every_statement_runs_or_says_why_not(rehearsal: Outcome, notes: Path) -> None:
    share, silent, wrong = report(notes)
    assert silent == [], "reached by no rehearsal: say `# card-only`, or rehearse them"
    wrong = [place for place in wrong if "llama" not in place]  # a machine may have transformers
    assert wrong == [], "reached by a rehearsal, and said to be for a card only"
    assert share >= 0.95


@pytest.mark.slow
def test_rows_of_an_earlier_run_are_kept(rehearsal: Outcome) -> None:
    [earlier] = rehearsal.folder.glob("accept-*.json")
    assert json.loads(earlier.read_text()) == EARLIER


@pytest.mark.parametrize("seconds", ["nan", "0", "-5", "inf"])
def test_seconds_that_are_none(seconds: str, accept: Accept) -> None:
    outcome = accept("--seconds", seconds)
    assert outcome.code == 2 and f"{seconds}: need a number above 0" in outcome.said
    assert outcome.rows == EARLIER


@pytest.mark.slow
def test_what_is_skipped(rehearsal: Outcome) -> None:
    reasons = {row["section"] for row in rehearsal.rows if row["kind"] == "skipped"}
    assert reasons <= {"sanitizer", "times", "llama"}


def test_no_test_is_imported() -> None:
    """`tests` takes GPUs out of sight, and would from a section on a card."""
    code = (
        "import os, sys; os.environ.pop('CUDA_VISIBLE_DEVICES', None); import experiments.gpu.preload; "
        "print(*(name in sys.modules for name in ('tests', 'experiments.gpu.sections.pair'))); "
        "print('CUDA_VISIBLE_DEVICES' in os.environ)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True", "False"], done.stderr
