"""A user's own schedule that can't be: refused in one line, before anything is started."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megapar.cli import main
from megapar.schedule import generators as package
from megapar.schedule.actions import ScheduleError
from megapar.schedule.build import build, generators

HEAD = """
from megapar.schedule.actions import Action
from megapar.schedule.generator import Generator

"""
FORWARD_ONLY = """
def rows(problem):
    return [[Action(s, "F", m) for m in range(problem.microbatches)] for s in range(problem.stages)]
SCHEDULE = Generator("mine", "own", rows)
"""
ONE_STAGE_WITHOUT = """
def rows(problem):
    kinds = lambda s: ("F",) if s == 1 else ("F", "B")
    return [[Action(s, k, m) for k in kinds(s) for m in range(problem.microbatches)] for s in range(problem.stages)]
SCHEDULE = Generator("mine", "own", rows)
"""
UNKNOWN = """
def rows(problem):
    return [[Action(s, "Z", 0)] for s in range(problem.stages)]
SCHEDULE = Generator("mine", "own", rows)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Puts a file mine.py among the generators."""
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    monkeypatch.delitem(__import__("sys").modules, f"{package.__name__}.mine", raising=False)
    generators.cache_clear()

    def write(text: str) -> None:
        (tmp_path / "mine.py").write_text(HEAD + text)

    yield write
    generators.cache_clear()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (FORWARD_ONLY, "pipeline.schedule=mine: rank 0: 0B0 is missing"),
        (ONE_STAGE_WITHOUT, "pipeline.schedule=mine: rank 0, action "),
        (UNKNOWN, "pipeline.schedule=mine: row 0, computation 0, 0Z0: unknown kind 'Z'"),
        ("x = 1", "pipeline.schedule=mine: megapar/schedule/generators/mine.py: declares no schedule; write SCHEDULE"),
        ("1 / 0", "mine.py: can't be used as a schedule (ZeroDivisionError: division by zero)"),
    ],
)
def test_it_is_refused(
    text: str, said: str, own: Callable[[str], None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    own(text)
    assert main(["train", "parallel=pp2", "pipeline.schedule=mine", f"run.dir={tmp_path / 'run'}"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("data: ")]
    assert len(lines) == 1 and said in lines[0], lines
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("ranks", "microbatches", "chunks"), [(0, 4, 1), (2, 0, 1), (2, 4, 0), (-1, 4, 1)])
def test_sizes_below_one(ranks: int, microbatches: int, chunks: int) -> None:
    with pytest.raises(ScheduleError, match=r"1f1b: -?\d+ (ranks|micro-batches|stages per rank); at least 1"):
        build("1f1b", ranks, microbatches, chunks=chunks)
