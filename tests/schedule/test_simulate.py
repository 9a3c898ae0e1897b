"""The simulator against hand-made replays. Closed forms of whole schedules are in test_generators.py."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from megapar.schedule.actions import Action, ScheduleError
from megapar.schedule.build import build
from megapar.schedule.check import check
from megapar.schedule.costs import Costs, read_costs
from megapar.schedule.simulate import simulate
from tests.schedule.tables import NAMES, table

TWO = table("0F0 0SEND_F0 0RECV_B0 0B0 0REDUCE", "1RECV_F0 1F0 1B0 1SEND_B0 1REDUCE")


def test_a_transfer_arrives_after_latency_and_size() -> None:
    """F 1, arrival at 1 + 0.5 + 0.25, F and B end at 4.75, back at 5.5, B ends at 7.5."""
    costs = Costs.even(2, 2, latency=0.5, transfer=0.25)
    simulation = simulate(TWO, costs)
    assert simulation.step_time == 7.5
    assert simulation.spans[1] == [
        (1.0, 1.75, Action(1, "RECV_F", 0)),
        (1.75, 2.75, Action(1, "F", 0)),
        (2.75, 4.75, Action(1, "B", 0)),
    ]
    assert simulation.exposed == [0.75, 0.75]  # waiting for rank 1 to compute is bubble, not communication
    assert simulation.busy == [3.0, 3.0]
    assert simulation.bubble == [1 - 3 / 7.5] * 2
    assert simulation.own_bubble == [1 - 3 / 7.5, 1 - 3 / 3.75]


def test_without_overlap_a_sender_stands_still() -> None:
    schedule = table("0F0 0SEND_F0 0F1 0SEND_F1", "1RECV_F0 1F0 1RECV_F1 1F1")
    overlapped = simulate(schedule, Costs.even(2, 2, transfer=0.5))
    assert overlapped.spans[0] == [(0.0, 1.0, Action(0, "F", 0)), (1.0, 2.0, Action(0, "F", 1))]
    assert overlapped.step_time == 3.5 and overlapped.exposed == [0.0, 0.5]
    blocking = simulate(schedule, Costs.even(2, 2, transfer=0.5, overlap=False))
    assert [end for _, end, _ in blocking.spans[0]] == [1.0, 1.5, 2.5, 3.0]
    assert blocking.step_time == 4.0 and blocking.exposed == [1.0, 1.0]


def test_a_channel_takes_one_message_at_a_time() -> None:
    """Transfers longer than F queue up: arrivals at 3, 5, 7 although the sends are at 1, 2, 3; latency adds once."""
    schedule = table("0F0 0SEND_F0 0F1 0SEND_F1 0F2 0SEND_F2", "1RECV_F0 1F0 1RECV_F1 1F1 1RECV_F2 1F2")
    spans = simulate(schedule, Costs.even(2, 2, transfer=2.0)).spans[1]
    assert [end for _, end, action in spans if action.kind == "RECV_F"] == [3.0, 5.0, 7.0]
    late = simulate(schedule, Costs.even(2, 2, transfer=2.0, latency=1.0)).spans[1]
    assert [end for _, end, action in late if action.kind == "RECV_F"] == [4.0, 6.0, 8.0]


def test_memory_by_event() -> None:
    """I frees a part, W the rest: F F I holds 2, then 1 + kept."""
    schedule = table("0F0 0F1 0I0 0F2 0W0 0I1 0W1 0I2 0W2 0REDUCE")
    assert check(schedule).in_flight == (3,)
    assert simulate(schedule, Costs.even(1, 1)).peak == [3.0]
    assert simulate(schedule, Costs.even(1, 1, kept=0.25)).peak == [2.25]
    assert simulate(schedule, Costs.even(1, 1, kept=0.0)).peak == [2.0]


def test_head_and_embedding_weigh_on_the_ends() -> None:
    costs = Costs.even(2, 4, F=1, I=2, W=3, head=0.4, embedding=0.2, reduce=1.0)
    assert costs.forward == pytest.approx((0.7, 0.5, 0.5, 0.9))
    assert costs.input_grad == pytest.approx((1.0, 1.0, 1.0, 1.8))
    assert costs.weight_grad == pytest.approx((2.1, 1.5, 1.5, 2.7))
    assert costs.activation == costs.reduce == (0.5,) * 4


def test_reductions_take_their_time() -> None:
    simulation = simulate(TWO, Costs.even(2, 2, reduce=0.5))
    assert simulation.step_time == 6.5 and simulation.busy == [3.5, 3.5]
    assert simulation.spans[0][-1] == (6.0, 6.5, Action(0, "REDUCE"))


def test_tied_stages_end_together() -> None:
    """One more reduction between the ranks of the first and the last stage; in a V they are one rank."""
    simulation = simulate(TWO, Costs.even(2, 2, tied=0.5))
    assert [spans[-1][:2] for spans in simulation.spans] == [(6.0, 6.5), (6.0, 6.5)]
    zbv = build("zbv", 2, 4)
    assert simulate(zbv, Costs.even(2, 4, tied=0.5)) == simulate(zbv, Costs.even(2, 4))


@pytest.mark.parametrize("name", NAMES)
def test_spans_are_in_order_and_add_up(name: str) -> None:
    costs = Costs.even(4, 4 * (1 if build(name, 4, 8).stages == 4 else 2), I=1.3, W=0.6, head=0.3, latency=0.1)
    schedule = build(name, 4, 8)
    simulation = simulate(schedule, costs)
    for rank, spans in enumerate(simulation.spans):
        for (_, end, _), (start, _, _) in pairwise(spans):
            assert end <= start
        busy = sum(end - start for start, end, action in spans if action.kind in ("F", "B", "I", "W"))
        assert busy == pytest.approx(simulation.busy[rank], rel=1e-12)  # rounding of a sum
    work = sum(costs.forward) + sum(costs.input_grad) + sum(costs.weight_grad)
    assert sum(simulation.busy) == pytest.approx(8 * work, rel=1e-12)


@pytest.mark.parametrize("p", [2, 4, 8])
def test_balance_is_worth_more_than_the_choice_of_schedule(p: int) -> None:
    """A last stage 40% heavier costs 1F1B more than going from the best schedule to 1F1B does."""
    m = 4 * p
    even, heavy = Costs.even(p, p), Costs.even(p, p, head=0.4)
    one_f_one_b = simulate(build("1f1b", p, m)).mean_bubble
    assert simulate(build("1f1b", p, m), heavy).mean_bubble > one_f_one_b + 0.1
    best = min(simulate(build(name, p, m, costs=even), even).mean_bubble for name in ("1f1b", "zb_h1", "zb_h2"))
    assert simulate(build("zb_h1", p, m), heavy).mean_bubble > best + 0.1


def test_costs_are_read_and_merged(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    lists = {"forward": [1, 2, 3, 4], "input_grad": [1, 1, 1, 1], "weight_grad": [2, 2, 2, 2], "latency": 0.5}
    path.write_text(json.dumps(lists))
    costs = read_costs(str(path), ranks=2)
    assert costs.merged(2).forward == (3, 7) and costs.merged(2).activation == (1.0, 1.0) and costs.latency == 0.5
    with pytest.raises(ScheduleError, match="costs of 4 parts of the model can't fill 5 stages"):
        costs.merged(5)
    assert costs.merged(3).forward == (3, 3, 4)
    for change, complaint in (
        ({"forward": [1, 2]}, "lists of different length"),
        ({"forward": [1, 2, 3, -4]}, "forward has -4; a cost is a number of at least 0"),
        ({"forward": [1, 2, 3, float("nan")]}, "forward has nan"),
        ({"forward": [1, 2, 3, float("inf")]}, "forward has inf"),
        ({"forward": [1, 2, 3, 10**400]}, "forward has 1000"),
        ({"forward": [1, 2, 3, True]}, "forward has True"),
        ({"forward": "1234"}, "forward must be a list"),
        ({"forward": [0, 0, 0, 0]}, "forward adds up to nothing"),
        ({"forward": []}, "forward must be a list"),
        ({"forwards": 1}, "unknown forwards"),
        ({"latency": "slow"}, "latency has slow"),
        ({"kept": 5}, "kept is 5, a share"),
        ({"overlap": "false"}, "overlap is 'false'; use true or false"),
    ):
        path.write_text(json.dumps(lists | change))
        with pytest.raises(ScheduleError, match=complaint):
            read_costs(str(path), ranks=2)
    for text in ("[1]", "[" * 100000, "{", "null"):
        path.write_text(text)
        with pytest.raises(ScheduleError, match=r"no JSON|needs an object"):
            read_costs(str(path), ranks=2)
    path.write_text("{}")
    with pytest.raises(ScheduleError, match="forward is missing"):
        read_costs(str(path), ranks=2)
