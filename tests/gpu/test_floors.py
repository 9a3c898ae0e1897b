"""A floor that is missed is a flag and no error; what was not measured has no floor to miss."""

import math
from pathlib import Path
from typing import Any

import pytest

from experiments.gpu.run import Run
from experiments.gpu.section import Section, find
from experiments.gpu.sections import sanitizer, times
from experiments.gpu.table import RowFile, read_rows, summary, word_of
from experiments.gpu.timing import Timed, measure


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A run that takes itself for a card's; its clock is in `clock`."""
    rows = RowFile(tmp_path / "accept.json")
    run = Run("times", tmp_path, 60.0, "cpu", 0, {}, rows.add)
    run.cuda = True
    return run


def rows_of(run: Run) -> dict[str, dict]:
    return {row["check"]: row for row in read_rows(run.out / "accept.json")}


def test_rates_and_shares(card: Run) -> None:
    card.rate("fast", 2.0, "GB/s", 1.5)
    card.rate("slow", 1.0, "GB/s", 1.5)
    card.rate("broken", math.nan, "GB/s", 1.5)
    card.rate("no ceiling", 1.0, "GB/s", math.nan)
    card.share("idle", 0.2, 0.05)
    card.share("busy", 0.01, 0.05)
    card.within("right", 1e-7, 3e-5, 2e-6)
    card.within("expected to be less", 1e-5, 3e-5, 2e-6)
    card.within("wrong", 1e-3, 3e-5, 2e-6)
    card.within("not a number", math.nan, 3e-5)
    words = {check: word_of(row) for check, row in rows_of(card).items()}
    assert [check for check, word in words.items() if word == "WRONG"] == ["broken", "wrong", "not a number"]
    assert [check for check, word in words.items() if word == "below"] == ["slow", "idle", "expected to be less"]
    assert rows_of(card)["no ceiling"]["floor_met"] is None and rows_of(card)["slow"]["ok"] is True


def test_floors_beside_others(card: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "bench", lambda call: call())

    def fails() -> float:
        raise RuntimeError("no such kernel\nand more")

    others: Any = {"cuBLAS": (lambda: 1.8, 0.9), "other": (lambda: 4.0, None), "absent": (fails, 1.0)}
    measure(card, Timed("product", 1000.0, "TFLOP/s", lambda: 2.0, others, 800.0, 0.95, "cuBLAS"))
    rows = rows_of(card)
    assert rows["product"]["value"] == 500.0 and rows["product"]["floor"] == pytest.approx(0.95 * 1000 / 1.8, rel=1e-4)
    assert rows["product"]["floor_met"] is False and rows["product"]["ok"] is True
    assert rows["product beside cuBLAS"]["value"] == 0.9 and rows["product beside cuBLAS"]["floor_met"] is True
    assert rows["product beside other"]["value"] == 2.0 and rows["product beside other"]["floor"] is None
    assert rows["product beside absent"]["ok"] is None and "no such kernel" in rows["product beside absent"]["reason"]


def test_a_ceiling_is_what_this_run_measured(card: Run, tmp_path: Path) -> None:
    assert math.isnan(card.ceiling("copy"))
    rows = RowFile(tmp_path / "accept.json")
    Run("ceilings", tmp_path, 60.0, "cpu", 0, {}, rows.add).row("copy", True, 3000.0, "GB/s")
    assert card.ceiling("copy") == 3000.0
    assert "3000.0 GB/s" in summary(rows.rows, {"ceilings": 3.0})


def test_what_is_asked_of_a_card() -> None:
    """The floors of docs/gpu.md."""
    from experiments.gpu import timed_rows
    from experiments.gpu.sections import llama, profile

    assert (times.OF_CUBLAS, times.OF_CUBLAS_DW, timed_rows.SHARE) == (0.90, 0.75, 0.85)
    _, forward, backward = times.ATTENTION["D128 8B 1x8192"]
    assert forward == {"FLASH": 1.15, "cuDNN": 0.85} and backward == {"FLASH": 1.2, "cuDNN": 0.7}
    assert (profile.MFU, profile.IDLE, profile.BESIDE_PLAIN, llama.BESIDE) == (0.50, 0.05, 1.15, 1.05)


def test_what_is_timed_is_alone() -> None:
    sections = [section for _, section in find()[0].values()]
    waves = {section.name: section.wave for section in sections}
    assert all(waves[need] < section.wave for section in sections for need in section.needs)
    for name in ("times", "profile", "llama"):
        assert [section.name for section in sections if section.wave == waves[name]] == [name]
    assert all(isinstance(section, Section) for section in sections)


SAID = {
    "ERROR SUMMARY: 2 errors": "WRONG",
    "ERROR SUMMARY: 0 errors": "ok",
    "Device not supported": "skip",
}


@pytest.mark.parametrize("text", SAID)
def test_what_memcheck_says(card: Run, text: str) -> None:
    sanitizer.checked(card, ["echo", f"launches done\n{text}"])
    assert word_of(rows_of(card)["memcheck"]) == SAID[text]
