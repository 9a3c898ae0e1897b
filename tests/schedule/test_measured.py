"""Costs measured in a run, and back into the simulator."""

import json
from pathlib import Path

import pytest

from megapar.schedule.actions import Action, ScheduleError
from megapar.schedule.build import build, generators
from megapar.schedule.costs import Costs, read_costs, write_costs
from megapar.schedule.measured import measured_costs, spread
from megapar.schedule.simulate import simulate

HALVES = ("0F0", 1.0), ("0I0", 2.0), ("0W0", 3.0), ("0REDUCE", 0.5), ("1F0", 4.0), ("1I0", 5.0), ("1W0", 6.0)


def test_medians_by_stage() -> None:
    """Odd ones out do not count, texts and actions are alike, transfers are left out, and no REDUCE is none."""
    more: list[tuple[Action | str, float]] = [
        ("0F0", 1.5),
        ("0F1", 90.0),
        (Action(1, "W", 1), 6.5),
        ("1W1", 7.0),
        ("0SEND_F0", 50.0),
        ("1RECV_F0", 60.0),
    ]
    costs = measured_costs(build("zb_h1", 2, 2), [*HALVES, *more])
    assert costs.forward == (1.5, 4.0) and costs.input_grad == (2.0, 5.0) and costs.weight_grad == (3.0, 6.5)
    assert costs.reduce == (0.5, 0.0) and costs.activation == (1.0, 1.0)


def test_a_whole_backward_is_split_evenly() -> None:
    """Where a stage ran both, its halves say what they took."""
    spans = [("0F0", 1.0), ("0B0", 4.0), ("0B1", 6.0), ("1F0", 2.0), ("1B0", 9.0), ("1I1", 1.0), ("1W1", 2.0)]
    costs = measured_costs(build("1f1b", 2, 2), spans)
    assert costs.input_grad == (2.5, 1.0) and costs.weight_grad == (2.5, 2.0)


@pytest.mark.parametrize("missing", ["1F0", "0W0", "1I0"])
def test_what_was_not_measured_is_named(missing: str) -> None:
    spans = [span for span in HALVES if span[0] != missing]
    with pytest.raises(ScheduleError, match=r"no [FBW] of stage [01] was measured; it takes a whole training step"):
        measured_costs(build("zb_h1", 2, 1), spans)


@pytest.mark.parametrize("name", generators())
def test_what_is_simulated_with_costs_measures_as_them(name: str) -> None:
    schedule = build(name, 2, 8)
    stages = range(1, schedule.stages + 1)
    whole = not any(action.kind == "I" for row in schedule.rows for action in row)
    costs = Costs(
        forward=tuple(1.0 * s for s in stages),
        input_grad=tuple(1.5 * s for s in stages),
        weight_grad=tuple((1.5 if whole else 0.5) * s for s in stages),
        activation=(2 / schedule.stages,) * schedule.stages,
        reduce=tuple(0.25 * s for s in stages),
    )
    spans = [(action, end - start) for row in simulate(schedule, costs).spans for start, end, action in row]
    measured = measured_costs(schedule, spans)
    for of in ("forward", "input_grad", "weight_grad", "reduce", "activation"):
        assert getattr(measured, of) == pytest.approx(getattr(costs, of))  # ends are sums of what came before


def test_costs_are_written_and_read(tmp_path: Path) -> None:
    costs = Costs.even(2, 4, F=1 / 3, head=0.4, reduce=0.1, latency=0.25, overlap=False)
    path = tmp_path / "costs.json"
    write_costs(costs, path)
    found = read_costs(str(path), 2)
    assert found.forward == pytest.approx(costs.forward, rel=5e-6) and found.forward[0] == 0.166667  # six digits
    assert (found.latency, found.overlap, found.stages) == (0.25, False, 4)
    assert json.loads(path.read_text()).keys() == costs.__dataclass_fields__.keys()


def test_a_stages_costs_are_its_layers_and_what_stands_at_the_ends() -> None:
    costs = measured_costs(build("zb_h1", 2, 2), HALVES)
    layers = spread(costs, [2, 4], [0.5, 0.25])
    assert layers.forward == (0.75, 0.25, 0.25, 0.25, 0.25, 3.25)
    assert layers.weight_grad == (2.25, 0.75, 0.375, 0.375, 0.375, 4.875)
    assert layers.activation == (0.5, 0.5, 0.25, 0.25, 0.25, 0.25)
    assert layers.cut([2, 4]) == costs
    alone = spread(costs, [2, 0], [0.5, 1.0])  # the head alone
    assert alone.forward == (0.75, 0.25 + costs.forward[1]) and alone.head[0] == costs.forward[1]
    assert alone.cut([2, 0]).forward == (1.0 + costs.forward[1], 0.0)
    middle = spread(
        measured_costs(build("1f1b", 3, 1), [(f"{s}{k}0", 6.0) for s in range(3) for k in "FB"]), [1, 3, 1], [0.5] * 3
    )
    assert middle.forward == (6.0, 2.0, 2.0, 2.0, 6.0)
