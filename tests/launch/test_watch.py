"""Who is to blame for an operation that takes too long."""

from dataclasses import replace
from pathlib import Path

import pytest

from megapar.launch.rank import Job
from megapar.launch.watch import describe, find, table
from megapar.trace.board import Doing

NOW = 1000.0
WAITS = Doing(0, 2**22 + 1, 5, "all_reduce over tp of ranks 0, 1", "0B1", True, NOW - 9, NOW - 0.1, 77)
WORKS = replace(WAITS, rank=1, operation="1F0", within="pipeline", waiting=False, since=NOW - 10)


def test_a_rank_that_waits_is_not_blamed_for_one_that_works() -> None:
    found = find([WAITS, WORKS, replace(WAITS, rank=2)], NOW)
    assert [one.rank for one in found.culprits] == [1] and found.reason == "the others wait for it"


def test_a_rank_without_a_heartbeat_comes_first_whatever_it_was_doing() -> None:
    silent = replace(WAITS, rank=2, beat=NOW - 5)
    found = find([WAITS, WORKS, silent], NOW)
    assert [one.rank for one in found.culprits] == [2] and found.reason == "no heartbeat"


def test_a_rank_that_has_not_started_comes_before_all_others() -> None:
    absent = Doing(3, 0, 0, "not started", "", False, NOW - 20, 0.0, 0)
    found = find([WAITS, WORKS, replace(WAITS, rank=2, beat=NOW - 5), absent], NOW)
    assert [one.rank for one in found.culprits] == [3] and len(found.waiting) == 3
    line = describe(found, NOW, Job("", "", "", "run", "cpu", 1.0, 4))
    assert line.startswith("stuck: rank 3 for 20.0 s in its start-up (it has begun no operation); ranks 0, 2 wait")


def test_where_all_wait_all_are_named() -> None:
    found = find([WAITS, replace(WAITS, rank=1, operation="all_gather over tp of ranks 0, 1")], NOW)
    assert len(found.culprits) == 2 and found.reason == "all wait for each other: their operations differ"


def test_who_waits_for_an_operation_that_does_not_end_is_not_blamed_for_it() -> None:
    """Ranks 0 and 1 have met, and ranks 2 and 3 wait for one of them, or for each other's next micro-batch."""
    met = [WAITS, replace(WAITS, rank=1)]
    others = [replace(WAITS, rank=rank, operation=f"all_reduce over dp of ranks {rank - 2}, {rank}") for rank in (2, 3)]
    found = find([*met, *others], NOW)
    assert [one.rank for one in found.culprits] == [0, 1] and "does not end" in found.reason
    apart = [WAITS, replace(WAITS, rank=1, within="0B2")]
    assert len(find([*apart, *others], NOW).culprits) == 4


def test_a_line_names_operations_and_groups_who_waits_alike() -> None:
    line = describe(
        find([WAITS, WORKS, replace(WAITS, rank=2), replace(WAITS, rank=3, operation="optimizer", within="")], NOW),
        NOW,
        Job("", "", "", "run", "cpu", 1.0, 4),
    )
    assert line == (
        "stuck: rank 1 for 10.0 s in step 5, 1F0 in pipeline (the others wait for it); ranks 0, 2 wait in step 5, "
        "all_reduce over tp of ranks 0, 1 in 0B1; rank 3 waits in step 5, optimizer; "
        f"Python stacks: {Path('run/logs/stacks-*.txt')}"
    )


def test_a_table_has_no_times_of_a_rank_that_is_not_there() -> None:
    there, missing = table([WAITS, Doing(1, 0, 0, "not started", "", False, 0.0, 0.0, 0)], NOW)
    assert there["seconds"] == 9.0 and there["silent_s"] == pytest.approx(0.1)
    assert missing["seconds"] is missing["silent_s"] is None
