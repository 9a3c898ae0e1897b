"""The picture of a run: measured above, simulated below, at one scale."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

from megapar.config.layout import Layout
from megapar.report.picture import draw
from megapar.report.svg import COLOURS, GRID, LEFT, RIGHT, WAIT
from megapar.schedule.build import build
from megapar.trace.file import RankTrace, Trace, read, write
from megapar.trace.spans import Span
from tests.report.test_timeline import SVG, bars

ONE_STAGE = [
    ("F", "0F0", 0.1, 0.4),
    ("tp", "all_reduce", 0.2, 0.3),
    ("B", "0B0", 0.5, 1.0),
    ("REDUCE", "0REDUCE", 1.0, 1.2),
]
AFTER = [("phase", "pipeline", 0.0, 1.2), ("OPTIMIZER", "optimizer", 1.2, 2.0), ("world", "all_reduce", 1.3, 1.6)]


def write_trace(folder: Path, ranks: list[RankTrace], name: str, pp: int, microbatches: int, **sizes: int) -> None:
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n')
    write(Trace(Layout(pp=pp, **sizes), name, build(name, pp, microbatches), ranks, 1e-4, {}), folder / "trace.json")


def texts(path: Path) -> list[tuple[str, float]]:
    """(text, y) of everything written."""
    root = ElementTree.fromstring(path.read_text())
    return [(str(found.text), float(found.attrib["y"])) for found in root.iter(f"{SVG}text")]


def test_one_rank(tmp_path: Path) -> None:
    """Bars with their hover, a wait as a mark, the meeting before the optimizer as idle; then the same simulated."""
    spans = [Span(*span) for span in (*ONE_STAGE, *AFTER)]
    place = {"pp": 0, "dp": 0, "tp": 0}
    faster = [Span(kind, name, start, start + (stop - start) / 3) for kind, name, start, stop in (*ONE_STAGE, *AFTER)]
    write_trace(tmp_path, [RankTrace(place, {1: faster, 2: spans})], "1f1b", 1, 1)
    path = draw(tmp_path)
    assert path is not None
    drawn = bars(ElementTree.fromstring(path.read_text()))
    # Simulated with the medians of both steps: two thirds of the second's.
    assert [(note, fill) for note, _, _, fill in drawn] == [
        ("0F0: 300.0 ms", COLOURS["F"]),
        ("0B0: 500.0 ms", COLOURS["B"]),
        ("0REDUCE: 200.0 ms", COLOURS["REDUCE"]),
        ("optimizer: 400.0 ms", COLOURS["OPTIMIZER"]),
        ("all_reduce: 100.0 ms", WAIT),
        ("waiting, all_reduce: 300.0 ms", "none"),
        ("0F0: 200.0 ms", COLOURS["F"]),
        ("0B0: 333.3 ms", COLOURS["B"]),
        ("0REDUCE: 133.3 ms", COLOURS["REDUCE"]),
    ]
    scale = (960 - LEFT - RIGHT) / 2.0  # the step takes 2 s
    for (_, x, width, _), (start, seconds) in zip(
        (drawn[0], drawn[3], drawn[6], drawn[7]), ((0.1, 0.3), (1.6, 0.4), (0.0, 0.2), (0.2, 1 / 3)), strict=True
    ):
        # Positions are written with two digits, and a bar ends 0.4 before the next.
        assert (x, width) == pytest.approx((LEFT + start * scale, seconds * scale - 0.4), abs=0.006)
    said = [text for text, _ in texts(path)]
    title = "Step 2, 1f1b: pipeline 1,200 ms measured, 667 ms simulated; bubble 16.7% measured, 0.0% simulated"
    assert title in said
    assert "Simulated: the same schedule with the median costs over steps 1 to 2" in said


def test_the_loss_begins_where_the_run_does(tmp_path: Path) -> None:
    """After step 100 of another run: its last evaluation is at the left edge, and no room is left for steps before."""
    rows = ['{"step": 100, "val_loss": 3.0}', *(f'{{"step": {step}, "loss": 2.0}}' for step in range(101, 111))]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    path = draw(tmp_path)
    assert path is not None
    root = ElementTree.fromstring(path.read_text())
    (line,) = root.iter(f"{SVG}polyline")
    xs = [float(point.split(",")[0]) for point in line.attrib["points"].split()]
    (circle,) = root.iter(f"{SVG}circle")
    tenth = (960 - LEFT - RIGHT) / 10
    assert float(circle.attrib["cx"]) == LEFT
    assert xs == pytest.approx([LEFT + tenth * number for number in range(1, 11)], abs=0.06)
    numbers = [text for text, _ in texts(path)]
    assert "100" in numbers and "110" in numbers and "0" not in numbers


def stage_trace(pp: int, dp: int, tp: int) -> RankTrace:
    """A rank of two stages with one micro-batch: each action takes 1 s."""
    first, last = (0.0, 3.0) if pp == 0 else (1.0, 2.0)
    spans = [("F", f"{pp}F0", first, first + 1), ("B", f"{pp}B0", last, last + 1), ("phase", "pipeline", 0.0, 4.0)]
    spans.sort(key=lambda span: (span[2], -span[3]))
    return RankTrace({"pp": pp, "dp": dp, "tp": tp}, {2: [Span(*span) for span in spans]})


def test_measured_above_simulated_below(tmp_path: Path) -> None:
    ranks = [stage_trace(pp, dp, 0) for pp in (0, 1) for dp in (0, 1)]
    write_trace(tmp_path, ranks, "1f1b", 2, 1, dp=2)
    path = draw(tmp_path)
    assert path is not None
    at = dict(texts(path))
    order = [
        next(text for text in at if text.startswith("Step 2, 1f1b: pipeline 4,000 ms measured, 4,000 ms simulated; ")),
        "Measured: what every rank did",
        *(f"pp {pp}  dp {dp}  tp 0" for pp in (0, 1) for dp in (0, 1)),
        "Simulated: the same schedule with the median costs of step 2",
        "pp 0",
        "pp 1",
    ]
    heights = [at[text] for text in order]
    assert heights == sorted(heights) and len(set(heights)) == len(heights)
    assert "bubble 50.0% measured, 50.0% simulated" in order[0]
    root = ElementTree.fromstring(path.read_text())
    drawn = bars(root)
    assert [bar[1:3] for bar in drawn[:2]] == [bar[1:3] for bar in drawn[8:10]]  # to one scale
    lanes = [r for r in root.iter(f"{SVG}rect") if r.attrib["fill"] == GRID and float(r.attrib["width"]) > 99]
    assert len(lanes) == 4 + 2


@pytest.mark.parametrize("tp,shown", [(8, 32), (9, 2)])
def test_of_many_ranks_one_pipeline_is_drawn(tp: int, shown: int, tmp_path: Path) -> None:
    ranks = [stage_trace(pp, dp, each) for pp in (0, 1) for dp in (0, 1) for each in range(tp)]
    write_trace(tmp_path, ranks, "1f1b", 2, 1, dp=2, tp=tp)
    assert read(tmp_path / "trace.json").ranks == ranks  # each rank at its place
    path = draw(tmp_path)
    assert path is not None
    said = [text for text, _ in texts(path)]
    assert len([text for text in said if "  dp " in text]) == shown
    assert ("Measured: what dp 0, tp 0 of 36 ranks did" in said) == (shown == 2)


def test_losses_have_the_unit_of_the_task(tmp_path: Path) -> None:
    for unit, title in (("nats/sample", "Loss in nats per sample"), (None, "Loss in nats per token")):
        (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
        (tmp_path / "summary.json").write_text("{}" if unit is None else f'{{"loss_unit": "{unit}"}}')
        path = draw(tmp_path)
        assert path is not None and texts(path)[0][0] == title
