"""Schedules and their checker: pure data, no processes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megapar.pipeline.partition import partition
from megapar.schedule.actions import KINDS, Action, Schedule
from megapar.schedule.check import ScheduleError, check
from megapar.schedule.schedules import SCHEDULES, build, forward_only, ideal_bubble, lower


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("stages", range(1, 9))
def test_every_schedule_is_proven(name: str, stages: int) -> None:
    for microbatches in range(1, 33):
        peak = check(build(name, stages, microbatches))
        if name == "gpipe":
            assert peak == [microbatches] * stages
        else:
            assert peak == [min(stages - stage, microbatches) for stage in range(stages)]
        check(lower(forward_only(stages, microbatches), stages, microbatches))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("stages", "microbatches"), [(1, 1), (2, 4), (4, 4), (4, 8), (8, 32), (3, 2)])
def test_the_ideal_bubble_is_what_unit_costs_give(name: str, stages: int, microbatches: int) -> None:
    """Replay with F = 1 and B = 2 and free transfers: idle share of the phase equals (p-1)/(m+p-1)."""
    schedule = build(name, stages, microbatches)
    end: dict[tuple[int, str, int], float] = {}
    clock = [0.0] * stages
    pending = [[a for a in row if a.kind in ("F", "B")] for row in schedule.rows]
    while any(pending):
        for rank, row in enumerate(pending):
            if not row:
                continue
            action = row[0]
            before = (
                (action.stage - 1, "F", action.microbatch)
                if action.kind == "F"
                else (action.stage + 1, "B", action.microbatch)
            )
            if 0 <= before[0] < stages and before not in end:
                continue
            clock[rank] = max(clock[rank], end.get(before, 0.0)) + (1.0 if action.kind == "F" else 2.0)
            end[action.stage, action.kind, action.microbatch] = clock[rank]
            row.pop(0)
    assert 1 - 3 * microbatches / max(clock) == pytest.approx(ideal_bubble(stages, microbatches), abs=1e-12)


def test_the_text_form_is_read_back() -> None:
    for kind in KINDS:
        action = Action(3, kind, 0 if kind == "REDUCE" else 12)
        assert Action.parse(str(action)) == action
    for text in ("2X0", "F0", "2F", "2REDUCE1", "", "-1F0", "2F0 2B0"):
        with pytest.raises(ValueError, match="looks like 2F0"):
            Action.parse(text)


ROWS = build("1f1b", 3, 4).rows


@given(st.integers(0, 2), st.data())
def test_the_checker_refuses_a_row_without_one_action(rank: int, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(ROWS[rank]) - 1))
    rows = [list(row) for row in ROWS]
    del rows[rank][at]
    with pytest.raises(ScheduleError):
        check(Schedule(3, 4, tuple(map(tuple, rows))))


@given(st.integers(0, 2), st.data())
def test_the_checker_refuses_an_action_twice(rank: int, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(ROWS[rank]) - 1))
    rows = [list(row) for row in ROWS]
    rows[rank].insert(data.draw(st.integers(at, len(ROWS[rank]))), ROWS[rank][at])
    with pytest.raises(ScheduleError):
        check(Schedule(3, 4, tuple(map(tuple, rows))))


def rows_of(*texts: str) -> Schedule:
    rows = tuple(tuple(Action.parse(word) for word in text.split()) for text in texts)
    stages = len(rows)
    return Schedule(stages, 1 + max(a.microbatch for row in rows for a in row), rows)


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        (("0F0 0SEND_F0 0RECV_B0 0B0 0REDUCE", "1F0 1B0 1SEND_B0 1REDUCE"), "1F0: before 1RECV_F0"),
        (("0RECV_B0 0F0 0SEND_F0 0B0 0REDUCE", "1RECV_F0 1F0 1B0 1SEND_B0 1REDUCE"), "deadlock: rank 0 at 0RECV_B0"),
        (("0B0 0F0 0REDUCE",), "0B0: before 0F0"),
        (("0F0 0W0 0I0 0REDUCE",), "0W0: before 0I0"),
        (("0F0 0REDUCE 0B0",), "before the last backward"),
        (("0F0 0B0",), "0REDUCE is missing"),
        (("0F0 0I0 0REDUCE",), "before the last backward"),
        (("1F0 0B0 0REDUCE",), "no such stage"),
        (
            ("0F0 0SEND_F0 0SEND_F0 0RECV_B0 0B0 0REDUCE", "1RECV_F0 1F0 1B0 1SEND_B0 1REDUCE"),
            "0SEND_F0: a second time",
        ),
        (
            (
                "0F0 0F1 0SEND_F1 0SEND_F0 0RECV_B0 0B0 0RECV_B1 0B1 0REDUCE",
                "1RECV_F0 1F0 1RECV_F1 1F1 1B0 1SEND_B0 1B1 1SEND_B1 1REDUCE",
            ),
            "delivers 1RECV_F1 first",
        ),
    ],
)
def test_the_first_offending_action_is_named(rows: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(ScheduleError, match=complaint):
        check(rows_of(*rows))


def test_partitions_cover_the_layers_once() -> None:
    for layers in range(1, 20):
        for stages in range(1, layers + 1):
            parts = partition(layers, stages, "uniform")
            assert [layer for part in parts for layer in part] == list(range(layers))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
            assert len(parts[-1]) == min(map(len, parts))
    assert [len(part) for part in partition(8, 2, [5, 3])] == [5, 3]
