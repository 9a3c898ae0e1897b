"""A schedule to look at is the one that the command line shows."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

import megapar
from megapar.config.parse import parse
from megapar.report.config import ScheduleConfig
from megapar.report.schedules import compare

schedule: Any = megapar.schedule  # type checkers see the package alone


def test_figures_are_those_of_the_comparison() -> None:
    config = parse(ScheduleConfig, {"pipeline": {"schedule": "zbv"}, "stages": 4, "microbatches": 16})
    [found] = compare(config).candidates
    made = schedule("zbv", ranks=4, microbatches=16)
    assert (made.bubble, made.peak, made.step_time) == (
        found.simulation.mean_bubble,
        found.peak,
        found.simulation.step_time,
    )
    assert str(made) == "zbv: 4 ranks of 2 stages, 16 micro-batches, step 49.5, bubble 3.0%, peak 4 micro-batches"
    assert len(made.rows) == 4 and all(len(row) == 16 * 2 * 3 for row in made.rows)
    assert made.rows[0][0] == "0F0"
    assert (
        schedule("1f1b", ranks=4, microbatches=16, head=0.5).step_time
        > schedule("1f1b", ranks=4, microbatches=16).step_time
    )


def test_it_is_drawn_and_written(tmp_path: Path) -> None:
    made = schedule("1f1b", ranks=2, microbatches=3)
    picture = made.draw(tmp_path / "a.svg")
    ElementTree.fromstring(picture)
    assert picture == picture._repr_svg_() == made._repr_svg_() == (tmp_path / "a.svg").read_text()
    made.draw(tmp_path / "a.html")
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")
    assert made.csv(tmp_path / "a.csv").splitlines()[1] == "1F0,1B0,1F1,1B1,1F2,1B2"
    again = schedule(f"csv:{tmp_path / 'a.csv'}", ranks=2, microbatches=3)
    assert again.rows == made.rows


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "name": ({"name": "zbw"}, "schedule=zbw: no such schedule; did you mean zbv?"),
    "ranks": ({"ranks": 0}, "ranks=0: must be at least 1"),
    "type": ({"ranks": "four"}, "ranks=four: expects an integer"),
    "chunks": ({"chunks": 3}, "chunks=3: the zbv schedule has 2 stages per rank; use 2"),
    "micro-batches": ({"name": "dualpipe_v", "microbatches": 1}, "schedule=dualpipe_v:"),
    "all": ({"name": "all"}, "name one"),
    "cost": ({"transfr": 1}, "transfr=1: unknown; there are chunks, F, I, W"),
    "cost's value": ({"F": 0.0}, "costs.F=0.0: must be more than 0"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_can_not_be_had_says_why(what: str) -> None:
    values, said = REFUSED[what]
    with pytest.raises(megapar.ConfigError) as refusal:
        schedule(**{"name": "zbv", "ranks": 4, "microbatches": 16} | values)
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_picture_has_a_name_that_says_its_kind(tmp_path: Path) -> None:
    with pytest.raises(megapar.ConfigError, match=r"draws \.svg or \.html"):
        schedule("1f1b", ranks=2, microbatches=3).draw(tmp_path / "a.png")
