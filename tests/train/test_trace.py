"""trace.json of a run whose ranks have different clocks: every event once, in its place, in order."""

import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from megapar.config.errors import UserError
from megapar.config.layout import Layout
from megapar.config.schema import TrainConfig
from megapar.launch.pool import WorkerPool
from megapar.mesh import Mesh
from megapar.optim.optimizer import StepResult
from megapar.parallel import engines
from megapar.report.picture import draw
from megapar.schedule.actions import KINDS
from megapar.schedule.build import build
from megapar.schedule.costs import read_costs
from megapar.schedule.simulate import simulate
from megapar.trace.file import RankTrace, Trace, read, write
from megapar.trace.spans import FLIGHT, Span, clock_shifts
from megapar.train import loop
from megapar.train.hooks.trace import Trace as Tracer
from megapar.train.trainer import Figures, Step
from tests.tiny import tiny_config
from tests.virtual_time import VirtualClock

STEPS = (2, 3)
SCHEDULE = build("zb_h1", 2, 2)
SKEW_S = 100.0  # between the clocks of one rank and the next


def train(rank: int, world_size: int, config: TrainConfig) -> None:
    clock = time.perf_counter
    with mock.patch("time.perf_counter", lambda: clock() + SKEW_S * rank):
        loop.run(config, rank, world_size)


@pytest.fixture(scope="module")
def folder(pool: WorkerPool, tokens: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with pp=2, dp=2, four steps of two micro-batches, two of them traced; a checkpoint after each."""
    folder = tmp_path_factory.mktemp("traced")
    values: dict[str, Any] = {"pipeline.schedule": "zb_h1", "train.trace": list(STEPS), "run.dir": str(folder)}
    values |= {"checkpoint.every": 1, "logger.wandb.mode": "disabled", "train.dtype": "fp32"}
    pool.run(train, 4, tiny_config(tokens, "pp2dp2", **values))
    return folder


@pytest.fixture(scope="module")
def trace(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "trace.json").read_text())


def complete(trace: dict[str, Any]) -> Iterator[tuple[int, int, int, list[dict[str, Any]]]]:
    """(replica, pipeline rank, step, its complete events) of all."""
    for dp in (0, 1):
        for pp in (0, 1):
            where = 1 + dp, 3 + 2 * pp + dp  # process and thread
            mine = [e for e in trace["traceEvents"] if e["ph"] == "X" and (e["pid"], e["tid"]) == where]
            for step in STEPS:
                yield dp, pp, step, [event for event in mine if event["args"]["step"] == step]


def test_every_scheduled_action_is_there_once(trace: dict[str, Any]) -> None:
    for _, pp, _, events in complete(trace):
        actions = [event for event in events if event["cat"] in KINDS]
        assert [event["name"] for event in actions] == [str(action) for action in SCHEDULE.rows[pp]]
        for event, action in zip(actions, SCHEDULE.rows[pp], strict=True):
            about = {"stage": action.stage} | ({} if action.kind == "REDUCE" else {"microbatch": action.microbatch})
            assert event["args"].items() >= about.items() and event["cat"] == action.kind
        kinds = Counter(event["cat"] for event in events)
        assert kinds["phase"] == kinds["OPTIMIZER"] == 1
        # One gradient norm: neither the checkpoint's meetings nor those that set the clocks are part of a step.
        assert kinds["world"] == 1
    assert {e["args"]["step"] for e in trace["traceEvents"] if e["ph"] == "X"} == set(STEPS)


def test_events_nest(trace: dict[str, Any]) -> None:
    """In a thread an event is inside another or beside it, and every kind has its place."""
    inside = {"F": "phase", "I": "phase", "W": "phase", "REDUCE": "phase", "RECV_F": "phase", "SEND_B": "phase"}
    inside |= {"dp": "REDUCE", "world": "OPTIMIZER", "phase": "", "OPTIMIZER": ""}
    for *_, events in complete(trace):
        around: list[dict[str, Any]] = []
        for event in events:
            assert event["dur"] >= 0
            # Sums of tenths are not exact in floating point.
            while around and around[-1]["ts"] + around[-1]["dur"] <= event["ts"] + 0.01:
                around.pop()
            if around:
                assert event["ts"] + event["dur"] <= around[-1]["ts"] + around[-1]["dur"] + 0.01
            if event["cat"] in inside:
                assert (around[-1]["cat"] if around else "") == inside[event["cat"]], event
            around.append(event)


def test_arrows_lead_from_every_send_to_its_receive(trace: dict[str, Any]) -> None:
    events = trace["traceEvents"]
    ends = {ph: {e["id"]: e for e in events if e["ph"] == ph} for ph in "sf"}
    count = sum(action.kind.startswith("SEND") for row in SCHEDULE.rows for action in row)
    assert count == 4 and len(ends["s"]) == len([e for e in events if e["ph"] == "s"]) == count * 2 * len(STEPS)
    assert all(isinstance(number, int) for number in ends["s"])  # Perfetto reads no other text than a number
    assert ends["s"].keys() == ends["f"].keys() and len([e for e in events if e["ph"] == "f"]) == len(ends["f"])

    def at(end: dict[str, Any], kind: str) -> dict[str, Any]:
        """The one transfer that an end of an arrow lies in."""
        found = [
            e
            for e in events
            if e["ph"] == "X" and e["cat"].startswith(kind) and (e["pid"], e["tid"]) == (end["pid"], end["tid"])
            if e["ts"] <= end["ts"] <= e["ts"] + e["dur"]
        ]
        assert len(found) == 1
        return found[0]

    for number, start in ends["s"].items():
        send, receive = at(start, "SEND"), at(ends["f"][number], "RECV")
        assert send["pid"] == receive["pid"] and send["tid"] != receive["tid"]
        assert send["cat"][-1] == receive["cat"][-1]
        assert send["args"]["step"] == receive["args"]["step"]
        assert send["args"]["microbatch"] == receive["args"]["microbatch"]
        assert receive["args"]["stage"] - send["args"]["stage"] == (1 if send["cat"] == "SEND_F" else -1)
        # What comes has been sent, as far as the clocks agree: the run itself says how far.
        error = trace["otherData"]["clock_error_us"]
        assert receive["ts"] + receive["dur"] >= send["ts"] - error
        assert error < 0.5 * SKEW_S * 1e6


@pytest.mark.slow
def test_clocks_agree_to_a_tenth_of_a_second(trace: dict[str, Any]) -> None:
    assert trace["otherData"]["clock_error_us"] < 0.1 * 1e6


def test_no_two_transfers_share_an_arrow(tmp_path: Path) -> None:
    """A stage in the middle sends the same micro-batch both ways; tp peers and replicas send the same ones."""
    schedule = build("1f1b", 3, 2)
    ranks = [
        RankTrace(
            {"pp": pp, "dp": dp, "tp": tp},
            {step: [Span(a.kind, str(a), at, at + 1.0) for at, a in enumerate(schedule.rows[pp])] for step in STEPS},
        )
        for pp in range(3)
        for dp in range(2)
        for tp in range(2)
    ]
    write(Trace(Layout(dp=2, pp=3, tp=2), "1f1b", schedule, ranks, 0.0, {}), tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    for end in "sf":
        ids = [event["id"] for event in events if event["ph"] == end]
        assert len(ids) == len(set(ids)) == 8 * 4 * len(STEPS)


def train_with_slow_pieces(rank: int, world_size: int, config: TrainConfig) -> None:
    """Every piece of a matmul takes a second, and so does every message, by a clock that nothing else moves."""
    multiply = engines.matmul

    def slow(*operands: Any, **options: Any) -> Any:
        time.sleep(1.0)
        return multiply(*operands, **options)

    with VirtualClock(1.0).running(), mock.patch.object(engines, "matmul", slow):
        loop.run(config, rank, world_size)


def train_beside_a_slow_peer(rank: int, world_size: int, config: TrainConfig) -> None:
    """Rank 1 takes 2 ms longer for every piece, so what rank 0 sends is in flight at least that long."""
    multiply = engines.matmul

    def slow(*operands: Any, **options: Any) -> Any:
        time.sleep(0.002 * rank)
        return multiply(*operands, **options)

    with mock.patch.object(engines, "matmul", slow):
        loop.run(config, rank, world_size)


Pair = tuple[Span, Span]


def first_flights(job: Any, pool: WorkerPool, tokens: str, folder: Path, sequence_parallel: bool) -> list[Pair]:
    """Every collective of a first piece on rank 0 in a traced step, with the matmul of the second piece."""
    values: dict[str, Any] = {"parallel.tp_overlap": "chunked", "parallel.sequence_parallel": sequence_parallel}
    values |= {"train.seq_length": 32, "train.trace": [1, 1], "run.dir": str(folder), "logger.wandb.mode": "disabled"}
    pool.run(job, 2, tiny_config(tokens, "tp2", **values))
    spans = read(folder / "trace.json").ranks[0].steps[1]
    kind = "reduce_scatter" if sequence_parallel else "all_reduce"
    flights = [span for span in spans if span.kind == FLIGHT and span.name.startswith(f"{kind} 1/")]
    seconds = [span for span in spans if span.kind == "matmul" and span.name.startswith("matmul 2/")]
    assert len(flights) >= 4  # layers
    return [
        (one, min((two for two in seconds if two.start >= one.start), key=lambda two: two.start)) for one in flights
    ]


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_collective_is_in_flight_while_the_next_piece_is_multiplied(
    sequence_parallel: bool, pool: WorkerPool, tokens: str, tmp_path: Path
) -> None:
    """From its piece's end on for its second, as long as the next piece takes. Times in the file are to 0.1 us."""
    for flight, following in first_flights(train_with_slow_pieces, pool, tokens, tmp_path, sequence_parallel):
        assert (flight.start, flight.stop) == pytest.approx((following.start, following.start + 1.0), abs=2e-7)
        assert following.seconds >= 1.0 - 2e-7


@pytest.mark.slow
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_collective_is_in_flight_beside_a_slow_peer(
    sequence_parallel: bool, pool: WorkerPool, tokens: str, tmp_path: Path
) -> None:
    found = first_flights(train_beside_a_slow_peer, pool, tokens, tmp_path, sequence_parallel)
    overlapped = sum(following.start < flight.stop for flight, following in found)
    # Never, if the piece were waited for; a rank that loses its core in between may find it done.
    assert overlapped > len(found) / 2


def test_names_of_processes_and_threads(trace: dict[str, Any]) -> None:
    named = [e for e in trace["traceEvents"] if e["ph"] == "M" and e["name"] != "thread_sort_index"]
    assert {(e["name"], e["pid"], e["tid"]): e["args"]["name"] for e in named} == {
        ("process_name", 1, 3): "dp 0",
        ("process_name", 2, 4): "dp 1",
        ("thread_name", 1, 3): "pp 0 (stage 0)",
        ("thread_name", 1, 5): "pp 1 (stage 1)",
        ("thread_name", 2, 4): "pp 0 (stage 0)",
        ("thread_name", 2, 6): "pp 1 (stage 1)",
    }
    assert {e["tid"] for e in trace["traceEvents"]} == {3, 4, 5, 6}


def test_the_file_is_read_back(folder: Path) -> None:
    """Layout and schedule, and the bubble that metrics.jsonl has for the same step."""
    trace = read(folder / "trace.json")
    assert trace.schedule == SCHEDULE and trace.name == "zb_h1" and trace.steps == list(STEPS)
    assert [rank.place for rank in trace.ranks] == [{"pp": p, "dp": d, "tp": 0} for p in (0, 1) for d in (0, 1)]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for step in STEPS:
        # Times to 0.1 us: 7 actions in a phase of some ms.
        assert trace.bubble(step) == pytest.approx(rows[step - 1]["bubble"], abs=5e-4)


def test_costs_are_left_for_the_simulator(folder: Path) -> None:
    layers = read_costs(str(folder / "costs.json"), 2)
    costs = layers.cut([layers.stages // 2] * 2)
    expected = read(folder / "trace.json").costs()
    # Six digits there; times to 0.1 us here, of actions of some 100 us.
    assert costs.forward == pytest.approx(expected.forward, rel=2e-3, abs=2e-7)
    picture = draw(folder)
    assert picture is not None
    simulation = simulate(SCHEDULE, expected)
    assert f"bubble {read(folder / 'trace.json').bubble(3):.1%} measured, {simulation.mean_bubble:.1%} simulated" in (
        picture.read_text()
    )


def test_clocks_are_set_by_meetings() -> None:
    """Two clocks 5 apart. Who comes last bounds the shift from one side; both sides' narrowest bounds count."""
    meetings = [[(0.0, 2.0), (4.0, 4.5)], [(5.0, 7.25), (8.0, 9.25)]]
    # rank 1 - rank 0: at least 5 - 2 and 8 - 4.5, at most 7.25 - 0 and 9.25 - 4
    assert clock_shifts(meetings) == [(0.0, 0.0), ((3.5 + 5.25) / 2, (5.25 - 3.5) / 2)]
    assert clock_shifts([[]]) == [(0.0, 0.0)]


@pytest.mark.parametrize("first_step,traced", [(1, [2, 3]), (3, [3]), (4, [])])
def test_a_run_that_starts_later_traces_what_is_left(
    first_step: int, traced: list[int], tokens: str, tmp_path: Path
) -> None:
    values: dict[str, Any] = {"train.trace": [2, 3], "run.dir": str(tmp_path)}
    config = tiny_config(tokens, **values)
    trainer = SimpleNamespace(mesh=Mesh(), schedule=build("1f1b", 1, 1))
    loop: Any = SimpleNamespace(config=config, start=SimpleNamespace(step=first_step), trainer=trainer, folder=tmp_path)
    tracer = Tracer(loop)
    assert list(tracer.steps) == traced
    names = [("F", "0F0"), ("B", "0B0"), ("phase", "pipeline")]
    for step in range(first_step, 5):
        tracer.before(step)
        spans = [Span(kind, name, step, step + length) for length, (kind, name) in enumerate(names, 1)]
        figures = Figures(0.0, StepResult(0.0, skipped=False), 0.0, spans)
        tracer.after(step, Step(0.0, lambda figures=figures: figures))  # type: ignore[misc]
    assert (tmp_path / "costs.json").exists() == (tmp_path / "trace.json").exists() == bool(traced)
    if traced:
        trace = read(tmp_path / "trace.json")
        assert trace.steps == traced
        # Of spans that start together the outer one comes first, or a viewer would not nest them.
        assert [span.name for span in trace.ranks[0].steps[3]] == ["pipeline", "0B0", "0F0"]


def test_the_default_is_the_last_step(tokens: str) -> None:
    assert tiny_config(tokens).train.trace == [4, 4]


def test_a_trace_that_can_not_be_written_ends_no_run(tmp_path: Path) -> None:
    said: list[str] = []
    trainer = SimpleNamespace(mesh=Mesh(), schedule=build("1f1b", 1, 1))
    config = tiny_config("none", "single", **{"train.trace": [1, 1]})
    loop: Any = SimpleNamespace(
        config=config,
        start=SimpleNamespace(step=1),
        trainer=trainer,
        folder=tmp_path / "gone",
        writer=SimpleNamespace(say=said.append),
    )
    tracer = Tracer(loop)
    tracer.before(1)
    spans = [Span(kind, name, 1, 2) for kind, name in [("F", "0F0"), ("B", "0B0"), ("phase", "pipeline")]]
    tracer.after(1, Step(0.0, lambda: Figures(0.0, StepResult(0.0, skipped=False), 0.0, spans)))
    assert len(said) == 1 and said[0].startswith("trace       none: ") and "can't be written" in said[0]


def test_half_a_trace_is_one_line(folder: Path, tmp_path: Path) -> None:
    text = (folder / "trace.json").read_text()
    for content in (text[:900], "[]", '{"otherData": {}}'):
        (tmp_path / "trace.json").write_text(content)
        with pytest.raises(UserError, match=r"trace\.json: no trace of a run"):
            read(tmp_path / "trace.json")
