"""What a card said becomes documentation; what was written by hand stays."""

import json
from pathlib import Path

import pytest

from experiments.gpu import report
from experiments.gpu.table import row_of, skipped

VERSIONS = {"torch": "2.11.0", "triton": "3.6.0", "python": "3.12", "megapar": "abc"}
CARD = "NVIDIA H100 80GB HBM3"


def card_rows() -> list[dict]:
    same = {"device": CARD, "versions": VERSIONS}
    return [
        row_of("accept", "seed", True, "measured", value=7, note="--out X", device="cuda", versions=VERSIONS),
        row_of("ceilings", "copy", True, "measured", value=2987.0, unit="GB/s", floor=2500.0, floor_met=True, **same),
        row_of(
            "profile", "megapar: MFU", True, "measured", value=0.41, unit="of 989 TFLOP/s", floor=0.5,
            floor_met=False, note="a|b", **same,
        ),
        row_of("rows", "rope", False, "measured", value=0.5, unit="error", note="at most 0.004.", **same),
        skipped("llama", "transformers", "not installed", **same),
    ]  # fmt: skip


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    (tmp_path / "accept.json").write_text(json.dumps(card_rows()))
    folder = tmp_path / "results"
    folder.mkdir()
    assert report.keep(tmp_path, folder).name.startswith("nvidia-h100-80gb-hbm3-20")
    return folder


def test_what_is_committed_is_what_results_say() -> None:
    found = report.results(report.RESULTS)
    for path, long in ((report.ROOT / "docs" / "gpu.md", True), (report.ROOT / "README.md", False)):
        text = path.read_text()
        assert report.between(text, report.text_of(found, long)) == text, "run experiments/gpu/report.py"
        assert found or report.NOBODY in text


def test_figures_of_a_card(kept: Path) -> None:
    [one] = report.results(kept)
    assert one["card"] == CARD and one["command"] == "python experiments/gpu/accept.py --out X"
    long, short = (report.text_of([one], long) for long in (True, False))
    for text in (long, short):
        assert CARD in text and "triton 3.6.0" in text and "2 ok, 1 wrong, 1 below their floor, 1 skipped" in text
        assert "2987.0 GB/s" in text and "0.5, missed" in text
    assert "| rows | rope | 0.5 error | at most 0.004. |" in long and "a\\|b" in long
    assert report.NOBODY not in long


def test_only_what_is_between_the_markers_changes(kept: Path) -> None:
    text = f"by hand\n{report.BEGIN}\nold\n{report.END}\nby hand too\n"
    new = report.between(text, report.text_of(report.results(kept), False))
    assert new.startswith(f"by hand\n{report.BEGIN}\n") and new.endswith(f"{report.END}\nby hand too\n")
    assert "old" not in new and report.between(new, "old") == text


def test_a_rehearsal_is_not_kept(tmp_path: Path) -> None:
    rows = [row | {"kind": "rehearsed", "device": "cpu"} for row in card_rows()]
    (tmp_path / "accept.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="no card measured anything there"):
        report.keep(tmp_path, tmp_path)
    assert report.main(["keep", str(tmp_path / "nothing")]) == 2
