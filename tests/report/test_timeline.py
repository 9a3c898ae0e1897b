"""Pictures are well-formed, self-contained, and to scale."""

import math
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megapar.cli import main
from megapar.report.svg import COLOURS, GRID, LEFT, RIGHT, ticks
from megapar.report.timeline import Bar, Lane, draw_lanes, readable_width
from megapar.schedule.build import build
from megapar.schedule.simulate import simulate

SVG = "{http://www.w3.org/2000/svg}"


def bars(root: ElementTree.Element) -> list[tuple[str, float, float, str]]:
    """(hover text, x, width, fill) of everything that has a hover."""
    found = []
    for rect in root.iter(f"{SVG}rect"):
        title = rect.find(f"{SVG}title")
        if title is not None:
            found.append((str(title.text), float(rect.attrib["x"]), float(rect.attrib["width"]), rect.attrib["fill"]))
    return found


@pytest.mark.parametrize("suffix", ["svg", "html"])
def test_a_schedule_is_drawn_to_scale(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"picture.{suffix}"
    assert main(["schedule", "pipeline.schedule=zbv", "stages=2", "microbatches=4", f"plot={path}"]) == 0
    text = path.read_text()
    assert text.count("http") == 1  # the name of SVG's namespace; nothing is fetched
    assert text.count("<svg") == (1 if suffix == "svg" else 2)  # a page has the lanes' names apart: they stay in view
    root = ElementTree.fromstring(text[text.rindex("<svg") : text.rindex("</svg>") + 6])
    simulation = simulate(build("zbv", 2, 4))
    spans = [span for row in simulation.spans for span in row]
    drawn = bars(root)
    assert len(drawn) == len(spans)
    width = float(root.attrib["width"])
    scale = (width - LEFT - RIGHT) / simulation.step_time
    for (start, end, action), (note, x, wide, _) in zip(spans, drawn, strict=True):
        assert note.split()[0] == str(action)
        # Positions are written with two digits, and a bar ends 0.4 before the next.
        assert x == pytest.approx(LEFT + start * scale, abs=0.006)
        assert wide == pytest.approx((end - start) * scale - 0.4, abs=0.006)
    lanes = [
        rect for rect in root.iter(f"{SVG}rect") if rect.attrib["fill"] == GRID and float(rect.attrib["width"]) > 99
    ]
    assert [float(lane.attrib["width"]) for lane in lanes] == pytest.approx([width - LEFT - RIGHT] * 2)


def test_a_long_schedule_gets_room_for_its_numbers() -> None:
    lanes = [Lane("rank 0", [Bar(at, at + 1, "F", f"0F{at}", str(at)) for at in range(300)])]
    width = readable_width(lanes, 0, 300)
    assert width > 4000
    body, _ = draw_lanes("long", lanes, 0, 300, 0, width=width)
    labels = [element for element in body if "pointer-events" in element]
    assert len(labels) == 300
    narrow, _ = draw_lanes("long", lanes, 0, 300, 0)
    assert not [element for element in narrow if "pointer-events" in element]


@pytest.mark.parametrize("low,high", [(0.0, 1.0), (4.1, 4.15), (0.0, 7.0), (-3.0, 250.0), (2.0, 2.0), (0.0, 2373.0)])
def test_ticks_are_round_and_few(low: float, high: float) -> None:
    found = ticks(low, high, 6)
    assert (1 if low == high else 3) <= len(found) <= 7
    assert low - 1e-9 <= found[0] and found[-1] <= high + 1e-9
    assert all(len(f"{value:.6g}".replace(".", "").strip("-0")) <= 4 for value in found), found


def test_kinds_can_be_told_apart() -> None:
    """No two colours are near each other: B and a darker orange, which the eye confuses, are 53 of 441 apart."""

    def channels(colour: str) -> list[int]:
        return [int(colour[at : at + 2], 16) for at in (1, 3, 5)]

    palette = [*COLOURS.values(), GRID]
    for number, colour in enumerate(palette):
        for other in palette[:number]:
            assert math.dist(channels(colour), channels(other)) > 60, (colour, other)
