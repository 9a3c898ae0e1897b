"""`launch_until_done`, with a launcher that fails as it is told."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megapar.config.errors import UserError
from megapar.launch import restart
from megapar.launch.failure import GoingOn, RankFailure, Stopped
from megapar.launch.rank import Job
from megapar.launch.rundir import RESTARTS


def job(folder: Path, ranks: int = 4) -> Job:
    return Job("", "", "", str(folder), "cpu", 1.0, ranks)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[int], list[str]]]:
    """Run with these ends of launches, one after the other; `again` clears what is in the directory and gives a job of
    a rank less. Returns the ranks of every launch, and what was said."""

    def run(ends: list[BaseException | None], restarts: int) -> tuple[list[int], list[str]]:
        ranks: list[int] = []
        said: list[str] = []

        def launch(one: Job, quiet: bool, changed: Any) -> None:
            ranks.append(one.ranks)
            end = ends.pop(0)
            if end is not None:
                raise end

        def again(folder: str) -> Job:
            (tmp_path / RESTARTS).unlink(missing_ok=True)
            return job(tmp_path, ranks[-1] - 1)

        monkeypatch.setattr(restart, "launch", launch)
        restart.launch_until_done(job(tmp_path), restarts, again, said.append)
        return ranks, said

    return run


def test_a_failure_is_kept_also_if_the_run_starts_anew(run: Callable[..., Any], tmp_path: Path) -> None:
    ranks, said = run([RankFailure("Traceback\nrank 1 failed: x"), None], 3)
    assert ranks == [4, 3] and said == ["Traceback\nrank 1 failed: x", "run: restart 1 of 3"]
    [event] = map(json.loads, (tmp_path / RESTARTS).read_text().splitlines())
    assert (event["restart"], event["failure"]) == (1, "rank 1 failed: x")


def test_another_layout_is_no_restart(run: Callable[..., Any], tmp_path: Path) -> None:
    assert run([GoingOn(), GoingOn(), RankFailure("rank 0 failed: x"), GoingOn(), None], 1)[0] == [4, 3, 2, 1, 0]


@pytest.mark.parametrize("end", [UserError("no room"), Stopped(), SystemExit(143), KeyboardInterrupt()])
def test_what_is_no_failure_of_a_rank_ends_it(end: BaseException, run: Callable[..., Any]) -> None:
    with pytest.raises(type(end)):
        run([end], 5)


def test_a_run_that_was_to_stop_does_not_start_again(run: Callable[..., Any]) -> None:
    """A rank died before it had stopped."""
    asked = RankFailure("rank 1 failed: x")
    asked.asked = True
    with pytest.raises(RankFailure, match="x"):
        run([asked, None], 5)


def test_the_last_failure_is_raised(run: Callable[..., Any]) -> None:
    with pytest.raises(RankFailure, match="third"):
        run([RankFailure("first"), RankFailure("second"), RankFailure("third")], 2)
