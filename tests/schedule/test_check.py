"""The checker: every way to break a valid table is named."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megapar.schedule.actions import COMPUTE, KINDS, Action, Schedule, ScheduleError
from megapar.schedule.build import build, generators
from megapar.schedule.check import check
from megapar.schedule.compute import check_rows
from megapar.schedule.lower import lower
from tests.schedule.tables import table


def test_the_text_form_is_read_back() -> None:
    for kind in KINDS:
        action = Action(3, kind, 0 if kind == "REDUCE" else 12)
        assert Action.parse(str(action)) == action
    for text in ("2X0", "F0", "2F", "2REDUCE1", "", "-1F0", "2F0 2B0"):
        with pytest.raises(ScheduleError, match="looks like 2F0"):
            Action.parse(text)


SCHEDULES = [build("1f1b", 3, 4), build("interleaved", 2, 4, chunks=2), build("zb_h1", 3, 4), build("zbv", 2, 4)]


@settings(deadline=None)  # the machine may be busy
@given(st.sampled_from(SCHEDULES), st.data())
def test_a_table_without_one_action_is_refused(schedule: Schedule, data: st.DataObject) -> None:
    rows = [list(row) for row in schedule.rows]
    row = data.draw(st.sampled_from(rows))
    del row[data.draw(st.integers(0, len(row) - 1))]
    with pytest.raises(ScheduleError):
        check(Schedule(schedule.stages, schedule.microbatches, tuple(map(tuple, rows))))


@settings(deadline=None)  # the machine may be busy
@given(st.sampled_from(SCHEDULES), st.data())
def test_a_table_with_an_action_twice_is_refused(schedule: Schedule, data: st.DataObject) -> None:
    rows = [list(row) for row in schedule.rows]
    row = data.draw(st.sampled_from(rows))
    at = data.draw(st.integers(0, len(row) - 1))
    row.insert(data.draw(st.integers(at, len(row))), row[at])
    with pytest.raises(ScheduleError):
        check(Schedule(schedule.stages, schedule.microbatches, tuple(map(tuple, rows))))


@settings(deadline=None)  # the machine may be busy
@given(st.sampled_from(SCHEDULES), st.data())
def test_a_swap_is_refused_or_harmless(schedule: Schedule, data: st.DataObject) -> None:
    """What the checker accepts after a swap does run: an independent, slow replay agrees with it in every case."""
    rows = [list(row) for row in schedule.rows]
    row = data.draw(st.sampled_from(rows))
    i, j = data.draw(st.integers(0, len(row) - 1)), data.draw(st.integers(0, len(row) - 1))
    row[i], row[j] = row[j], row[i]
    swapped = Schedule(schedule.stages, schedule.microbatches, tuple(map(tuple, rows)))
    if runs(swapped):
        check(swapped)
    else:
        with pytest.raises(ScheduleError):
            check(swapped)


def runs(schedule: Schedule) -> bool:
    """Replay by the definition of each action: an action runs when all that it needs is done. Complete tables only."""
    done: set[Action] = set()
    rows = [list(row) for row in schedule.rows]
    moved = True
    while moved:
        moved = False
        for row in rows:
            while row and all(done & one_of for one_of in needs(schedule, row[0])):
                done.add(row.pop(0))
                moved = True
    return not any(rows)


def needs(schedule: Schedule, action: Action) -> list[set[Action]]:
    """What must have been done before an action: one of each set."""
    stage, kind, m = action
    last, rank_of = schedule.stages - 1, schedule.rank_of
    backward = {Action(stage, "B", m), Action(stage, "I", m)}
    if kind == "F":
        remote = stage > 0 and rank_of(stage - 1) != rank_of(stage)
        return [{Action(stage, "RECV_F", m) if remote else Action(stage - 1, "F", m)}] if stage else []
    if kind in ("B", "I"):
        before = [{Action(stage, "F", m)}]
        if stage < last:
            remote = rank_of(stage + 1) != rank_of(stage)
            local = {Action(stage + 1, "B", m), Action(stage + 1, "I", m)}
            before.append({Action(stage, "RECV_B", m)} if remote else local)
        return before
    if kind == "REDUCE":
        return [{Action(stage, "B", i), Action(stage, "W", i)} for i in range(schedule.microbatches)]
    return {
        "W": [{Action(stage, "I", m)}],
        "SEND_F": [{Action(stage, "F", m)}],
        "SEND_B": [backward],
        "RECV_F": [{Action(stage - 1, "SEND_F", m)}],
        "RECV_B": [{Action(stage + 1, "SEND_B", m)}],
    }[kind]


FIRST = "0F0 0SEND_F0 0RECV_B0 0B0 0REDUCE"
SECOND = "1RECV_F0 1F0 1B0 1SEND_B0 1REDUCE"


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        # a receive or a send dropped
        ((FIRST, "1F0 1B0 1SEND_B0 1REDUCE"), r"rank 1, action 0, 1F0: before 1RECV_F0"),
        (("0F0 0SEND_F0 0B0 0REDUCE", SECOND), r"rank 0, action 2, 0B0: before 0RECV_B0"),
        (("0F0 0RECV_B0 0B0 0REDUCE", SECOND), r"rank 1, action 0, 1RECV_F0: 0SEND_F0 is missing"),
        ((FIRST, "1RECV_F0 1F0 1B0 1REDUCE"), r"rank 0, action 2, 0RECV_B0: 1SEND_B0 is missing"),
        # sent and never received
        (
            ("0F0 0SEND_F0 0I0 0W0 0REDUCE 1RECV_F0 1F0 1B0 1REDUCE",),
            "stage 1 is on the same rank and receives nothing",
        ),
        # waits in a circle
        (("0RECV_B0 0F0 0SEND_F0 0B0 0REDUCE", SECOND), "deadlock: rank 0 at 0RECV_B0, rank 1 at 1RECV_F0"),
        (
            (
                "0F0 0SEND_F0 2RECV_F0 2F0 2SEND_F0 2RECV_B0 2B0 2SEND_B0 0RECV_B0 0B0 0REDUCE 2REDUCE",
                "3RECV_F0 3F0 3B0 3SEND_B0 1RECV_F0 1F0 1SEND_F0 1RECV_B0 1B0 1SEND_B0 1REDUCE 3REDUCE",
            ),
            "deadlock: rank 0 at 2RECV_F0, rank 1 at 3RECV_F0",
        ),
        # order within a row
        (("0B0 0F0 0REDUCE",), "0B0: before 0F0"),
        (("0F0 0W0 0I0 0REDUCE",), "0W0: before 0I0"),
        (("0SEND_F0 0F0 0RECV_B0 0B0 0REDUCE", SECOND), "0SEND_F0: before 0F0"),
        ((FIRST, "1RECV_F0 1F0 1SEND_B0 1B0 1REDUCE"), "1SEND_B0: before its backward"),
        (("1F0 0F0 1B0 0B0 0REDUCE 1REDUCE",), "1F0: before 0F0"),
        (("0F0 1F0 0B0 1B0 0REDUCE 1REDUCE",), "0B0: before the backward of stage 1"),
        # too often
        (("0F0 0F0 0B0 0REDUCE",), "rank 0, action 1, 0F0: a second time"),
        (("0F0 0B0 0I0 0W0 0REDUCE",), "0I0: a second backward of this micro-batch"),
        (("0F0 0I0 0B0 0W0 0REDUCE",), "0B0: a second backward of this micro-batch"),
        (("0F0 0SEND_F0 0SEND_F0 0RECV_B0 0B0 0REDUCE", SECOND), "0SEND_F0: a second time"),
        # reduced early, twice, never
        (("0F0 0REDUCE 0B0",), "rank 0, action 1, 0REDUCE: before the last backward of stage 0"),
        (("0F0 0I0 0REDUCE 0W0",), "0REDUCE: before the last backward"),
        (("0F0 0B0 0REDUCE 0REDUCE",), "rank 0, action 3, 0REDUCE: a second time"),
        (("0F0 0B0",), "rank 0: 0REDUCE is missing"),
        # incomplete
        (("0F0 0B0 1F0 1B0 1F1 1B1",), "0B0: before the backward of stage 1"),
        (("0F0 1F0 1B0 0B0 1F1 1B1",), "1F1: before 0F1"),
        (("0F1 0F0 0B0 0REDUCE",), "0REDUCE: before the last backward"),
        (("0F0 0I0",), "rank 0: 0W0 is missing"),
        (("0F1 0B1 0B0 0REDUCE",), "0B0: before 0F0"),
        ((FIRST, "1RECV_F0 1F0 1REDUCE"), "1REDUCE: before the last backward of stage 1"),
        # in the wrong place
        (("0F0 0B0 0REDUCE", "0F1 0B1"), "rank 1, action 0, 0F1: stage 0 lives on rank 0"),
        (("0F0 0RECV_F0 0B0 0REDUCE",), "0RECV_F0: no stage -1 to receive from"),
        (("0F0 0SEND_F0 0B0 0REDUCE",), "0SEND_F0: no stage 1 to send to"),
        (("1F0 1B0 1REDUCE",), "stage 0: no rank has it"),
        (("0F0 0B0 0REDUCE", "2RECV_F0 2F0 2B0 2SEND_B0 2REDUCE"), "stage 1: no rank has it"),
    ],
)
def test_the_first_offending_action_is_named(rows: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(ScheduleError, match=complaint):
        check(table(*rows))


def test_sizes_are_checked() -> None:
    rows = table("0F0 0B0 0REDUCE").rows
    with pytest.raises(ScheduleError, match="stage 1: no rank has it"):
        check(Schedule(2, 1, rows))
    with pytest.raises(ScheduleError, match="before the last backward"):
        check(Schedule(1, 2, rows))
    with pytest.raises(ScheduleError, match="0F0: no such stage or micro-batch"):
        check(Schedule(0, 1, rows))


def test_channels_deliver_in_the_senders_order() -> None:
    """A receiver may want messages in another order; receives are posted in the sender's."""
    schedule = table(
        "0F0 0F1 0SEND_F1 0SEND_F0 0RECV_B0 0B0 0RECV_B1 0B1 0REDUCE",
        "1RECV_F0 1F0 1RECV_F1 1F1 1B0 1SEND_B0 1B1 1SEND_B1 1REDUCE",
    )
    check(schedule)
    assert [str(action) for action in schedule.channel_order(0, 1, "F")] == ["1RECV_F1", "1RECV_F0"]
    assert [str(action) for action in schedule.channel_order(1, 0, "B")] == ["0RECV_B0", "0RECV_B1"]
    assert schedule.channel_order(1, 0, "F") == []


def test_a_v_has_both_legs_on_one_channel() -> None:
    """Activations of the way there and gradients of the way back go from rank 0 to 1, and each kind has its channel."""
    schedule = build("zbv", 2, 2)
    assert {action.stage for action in schedule.channel_order(0, 1, "F")} == {1}
    assert {action.stage for action in schedule.channel_order(0, 1, "B")} == {2}
    assert {action.stage for action in schedule.channel_order(1, 0, "F")} == {3}
    three = build("zbv", 3, 2)  # rank 1 sends activations both ways
    assert {action.stage for action in three.channel_order(1, 2, "F")} == {2}
    assert {action.stage for action in three.channel_order(1, 0, "F")} == {5}


def test_what_is_in_flight() -> None:
    proof = check(build("zbv", 4, 16))
    assert proof.in_flight == (8, 8, 8, 8)
    assert proof.in_flight_by_stage[0] + proof.in_flight_by_stage[7] >= 8


def test_sends_that_wait_for_their_receiver_are_told_apart() -> None:
    """GPipe sends one way at a time; in 1F1B neighbours send to each other at once, and neither receives."""
    assert check(build("gpipe", 4, 8), rendezvous=True).rendezvous is None
    where = check(build("1f1b", 2, 4), rendezvous=True).rendezvous
    assert where == "rank 0 at 0SEND_F1, rank 1 at 1SEND_B0"


TABLES = [
    ("0B0,0F0,0F1,0B1/1F0,1B0,1F1,1B1", "row 0, computation 0, 0B0: before 0F0"),
    ("0F0,0F1,0B0,0B1,0B0/1F0,1B0,1F1,1B1", "row 0, computation 4, 0B0: a second backward of this micro-batch"),
    ("0F0,0F1,0B0,0B1,0F0/1F0,1B0,1F1,1B1", "row 0, computation 4, 0F0: a second time"),
    ("0F0,0F1,0B0,0B1/1F0,1B0,1F1", "row 1: 1B1 is missing"),
    ("0F0,0F1,0I0,0B1/1F0,1B0,1F1,1B1", "row 0: 0W0 is missing"),
    ("0F0,0F1,0B0,0B1/1F0,1B0,1B1", "row 1, computation 2, 1B1: before 1F1"),
    ("0F0,0F1/1F0,1F1", "row 0: 0B0 is missing"),
    ("0F0,0B0,0F1,0B1/1F1,1B1,1F0,1B0", "every row waits for another: row 0 at 0B0 for the backward of 0 on stage 1"),
    ("/0F0,1F0,0F1,1F1,1B0,0B0,1B1,0B1", "row 0: no computation"),
    ("0F0,0F1,0W0,0B0,0B1/1F0,1B0,1F1,1B1", "row 0, computation 2, 0W0: before 0I0"),
    ("0F0,0F1,0B0,0B1/1F0,1B0,0F1,1F1,1B1", "row 1, computation 2, 0F1: stage 0 is in row 0"),
]


@pytest.mark.parametrize(("table", "message"), TABLES)
def test_a_tables_mistake_is_named_in_its_own_words(table: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(table.replace("/", "\n") + "\n")
    with pytest.raises(ScheduleError) as found:
        build(f"csv:{path}", 2, 2)
    assert message in str(found.value)


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_a_computation_less_or_twice_is_named(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(generators())))
    schedule = build(name, 2, 5)
    rows = [[action for action in row if action.kind in COMPUTE] for row in schedule.rows]
    check_rows(rows, schedule.stages, 5)
    row = data.draw(st.sampled_from(rows))
    at = data.draw(st.integers(0, len(row) - 1))
    action = row[at]
    if data.draw(st.booleans()):
        del row[at]
        wanted = f"{action}|the backward of {action.microbatch} on stage {action.stage}"
    else:
        row.insert(data.draw(st.integers(at, len(row))), action)
        wanted = f"{action}: a second"
    with pytest.raises(ScheduleError, match=wanted):
        check_rows(rows, schedule.stages, 5)


def test_training_needs_a_backward() -> None:
    """Also where no row has one; without the asking it is an evaluation."""
    forward = lower([[Action(0, "F", m) for m in range(2)], [Action(1, "F", m) for m in range(2)]], 2, 2)
    check(forward)
    with pytest.raises(ScheduleError, match="rank 0: 0B0 is missing"):
        check(forward, training=True)


def test_an_unknown_kind_is_one_line() -> None:
    with pytest.raises(
        ScheduleError, match=r"row 1, computation 1, 1X0: unknown kind 'X'; a schedule's rows have F, B"
    ):
        lower([[Action(0, "F", 0)], [Action(1, "F", 0), Action(1, "X", 0)]], 2, 1)
