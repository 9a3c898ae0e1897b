"""What the ranks of a run did when, as data and as a file: trace.json, in the Chrome trace-event format.

It opens in ui.perfetto.dev and chrome://tracing: a process per data-parallel replica, a thread per pipeline rank (and
tensor-parallel peer), and an arrow from every send to its receive. `otherData` holds the layout and the schedule, so
that the picture of the run can be drawn from the file alone. Format: "Trace Event Format", the Chromium project.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import fmean, median
from typing import Any

from megapar.config.errors import UserError
from megapar.config.layout import AXES, Layout
from megapar.files import write_atomic
from megapar.schedule.actions import KINDS, TRANSFERS, Action, Schedule
from megapar.schedule.costs import Costs
from megapar.schedule.measured import measured_costs, spread
from megapar.trace.spans import BUSY, FLIGHT, LAYERS, Span, stage_of_layers


@dataclass(frozen=True)
class RankTrace:
    """place: index along every axis of the mesh; steps: the spans of every traced step, by its number."""

    place: dict[str, int]
    steps: dict[int, list[Span]]


@dataclass(frozen=True)
class Trace:
    """The traced steps of a run; all times in seconds on one clock.

    name: the schedule's; clock_error: how far apart two ranks' clocks may still be
    parts: what every stage has of the model, in words; empty where nobody said so
    """

    layout: Layout
    name: str
    schedule: Schedule
    ranks: list[RankTrace]
    clock_error: float
    versions: dict[str, str]
    parts: tuple[str, ...] = ()

    @property
    def steps(self) -> list[int]:
        return sorted(self.ranks[0].steps)

    def costs(self) -> Costs:
        """What the schedule's actions cost in seconds: medians over steps, micro-batches and all ranks of a stage."""
        spans = (span for rank in self.ranks for step in rank.steps.values() for span in step)
        return measured_costs(self.schedule, ((span.name, span.seconds) for span in spans if span.kind in KINDS))

    def layer_costs(self, counts: Sequence[int]) -> Costs:
        """The same of every layer, where stage s has counts[s] of them. Without a LAYERS span it is all layers'."""
        spans = [span for rank in self.ranks for step in rank.steps.values() for span in step if span.kind == LAYERS]
        costs, share = self.costs(), [1.0] * len(counts)
        for stage in range(len(counts)):
            seconds = [span.seconds for span in spans if stage_of_layers(span.name) == stage]
            if seconds and costs.forward[stage]:
                share[stage] = min(1.0, median(seconds) / costs.forward[stage])
        return spread(costs, counts, share)

    def phase(self, step: int) -> float:
        """Seconds of a step's pipeline phase, from its first start to its last end on any rank."""
        spans = [span for rank in self.ranks for span in rank.steps[step] if span.kind == "phase"]
        return max(span.stop for span in spans) - min(span.start for span in spans)

    def bubble(self, step: int) -> float:
        """Share of a step's pipeline phase in none of F, B, I, W or reduction, as in metrics.jsonl."""
        busy, phase = [], []
        for rank in self.ranks:
            spans = rank.steps[step]
            busy.append(sum(span.seconds for span in spans if span.kind in BUSY))
            phase.append(next(span.seconds for span in spans if span.kind == "phase"))
        pipelines = [tuple(index for axis, index in rank.place.items() if axis != "pp") for rank in self.ranks]
        longest = {key: max(p for p, other in zip(phase, pipelines, strict=True) if other == key) for key in pipelines}
        return fmean(1.0 - b / longest[key] for b, key in zip(busy, pipelines, strict=True))


def write(trace: Trace, path: Path) -> None:
    """Write trace.json. Times are in microseconds, to a tenth, from the first span of all."""
    zero = min(span.start for rank in trace.ranks for spans in rank.steps.values() for span in spans)
    events: list[dict[str, Any]] = []
    numbers = count(1)
    for rank in trace.ranks:
        events += _names(trace, rank)
        for step, spans in rank.steps.items():
            events += _events(trace, rank, step, spans, zero, numbers)
    steps = trace.steps
    about = {
        "steps": [steps[0], steps[-1]],
        "layout": dict(trace.layout),
        "schedule": {
            "name": trace.name,
            "stages": trace.schedule.stages,
            "microbatches": trace.schedule.microbatches,
            "rows": [" ".join(map(str, row)) for row in trace.schedule.rows],
            "parts": list(trace.parts),
        },
        "clock_error_us": _us(trace.clock_error),
        "versions": trace.versions,
    }
    text = json.dumps({"traceEvents": events, "displayTimeUnit": "ms", "otherData": about}, separators=(",", ":"))
    write_atomic(path, text + "\n")


def read(path: Path) -> Trace:
    """The inverse of `write`, to a tenth of a microsecond. Raises UserError for another file, or half of one."""
    try:
        return _read(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: no trace of a run ({type(error).__name__}: {error})") from None


def _read(data: dict[str, Any]) -> Trace:
    about = data["otherData"]
    layout, schedule = Layout(**about["layout"]), about["schedule"]
    rows = tuple(tuple(Action.parse(text) for text in row.split()) for row in schedule["rows"])
    ranks: dict[int, RankTrace] = {}
    begun: dict[int, float] = {}
    for event in data["traceEvents"]:
        if event["ph"] == "b":
            begun[event["id"]] = event["ts"]
        if event["ph"] in ("X", "e"):
            thread = event["tid"]
            start = event["ts"] if event["ph"] == "X" else begun[event["id"]]
            stop = event["ts"] + event.get("dur", 0.0)
            rank = ranks.setdefault(thread, RankTrace(_place(layout, thread), {}))
            span = Span(event["cat"], event["name"], start / 1e6, stop / 1e6)
            rank.steps.setdefault(event["args"]["step"], []).append(span)
    return Trace(
        layout,
        schedule["name"],
        Schedule(schedule["stages"], schedule["microbatches"], rows),
        [ranks[thread] for thread in sorted(ranks)],
        about["clock_error_us"] / 1e6,
        about["versions"],
        tuple(schedule.get("parts", ())),
    )


def _us(seconds: float) -> float:
    return round(1e6 * seconds, 1)


def _where(trace: Trace, rank: RankTrace) -> dict[str, int]:
    """The numbers of a rank's process and thread. None is 0 and none is used twice: Perfetto takes 0 for the idle
    process, gives a name to a thread's number whatever its process, and takes a thread with its process' number for
    the main one."""
    layout, place = trace.layout, rank.place
    return {"pid": 1 + layout.replica(place), "tid": 1 + layout.replicas + layout.rank_at(place)}


def _place(layout: Layout, thread: int) -> dict[str, int]:
    """Where the rank of a thread is: the inverse of `_where`."""
    return layout.coordinates(thread - 1 - layout.replicas)


def _number(trace: Trace, rank: RankTrace, step: int, sent: Action) -> int:
    """A number for each transfer of the run: Perfetto reads an id as one, and texts that are none not at all."""
    schedule = trace.schedule
    layout, stage_peer = trace.layout, rank.place | {"pp": 0}
    number = step * layout.world + layout.rank_at(stage_peer)
    number = (number * schedule.stages + sent.stage) * schedule.microbatches + sent.microbatch
    return 2 * number + (sent.kind == "SEND_B")


def _names(trace: Trace, rank: RankTrace) -> Iterator[dict[str, Any]]:
    """Metadata: what the process and the thread of a rank are called."""
    where, place = _where(trace, rank), rank.place
    stages = trace.schedule.stages_of(place["pp"])
    replica = [axis for axis in place if AXES[axis].splits not in ("layers", "weights")]
    inside = [axis for axis in place if axis not in replica and (axis == "pp" or trace.layout[axis] > 1)]
    name = " ".join(f"{axis} {place[axis]}" for axis in inside)
    name += f" (stage{'s' if len(stages) > 1 else ''} {', '.join(map(str, stages))})"
    if all(index == 0 for axis, index in place.items() if axis not in replica):
        called = " ".join(f"{axis} {place[axis]}" for axis in replica if axis == "dp" or trace.layout[axis] > 1)
        yield {"ph": "M", "name": "process_name", **where, "args": {"name": called}}
    yield {"ph": "M", "name": "thread_name", **where, "args": {"name": name}}
    yield {"ph": "M", "name": "thread_sort_index", **where, "args": {"sort_index": where["tid"]}}


def _events(
    trace: Trace, rank: RankTrace, step: int, spans: list[Span], zero: float, numbers: Iterator[int]
) -> Iterator[dict[str, Any]]:
    """The complete events of a rank's step, an outer one before those inside, and its ends of the arrows.

    numbers: one for each operation in flight
    """
    where = _where(trace, rank)
    for span in sorted(spans, key=lambda span: (span.start, -span.stop)):
        # The end is rounded, not the duration: what was nested stays so.
        start, stop = _us(span.start - zero), _us(span.stop - zero)
        args: dict[str, Any] = {"step": step}
        if span.kind == FLIGHT:  # those of a rank overlap without nesting, so each gets a line of its own
            pair = {"name": span.name, "cat": span.kind, "id": next(numbers), **where, "args": args}
            yield {"ph": "b", "ts": start, **pair}
            yield {"ph": "e", "ts": stop, **pair}
            continue
        event = {"ph": "X", "name": span.name, "cat": span.kind, "ts": start, "dur": round(stop - start, 1), **where}
        if span.kind not in KINDS:
            yield event | {"args": args}
            continue
        action = Action.parse(span.name)
        args["stage"] = action.stage
        if action.kind != "REDUCE":
            args["microbatch"] = action.microbatch
        yield event | {"args": args}
        if action.kind in TRANSFERS:
            way = action.kind[-1]
            sender = action.stage
            if action.kind.startswith("RECV"):
                sender += -1 if way == "F" else 1
            sent = Action(sender, f"SEND_{way}", action.microbatch)
            arrow = {"name": "transfer", "cat": "transfer", "id": _number(trace, rank, step, sent)}
            if action.kind.startswith("SEND"):
                yield {"ph": "s", **arrow, "ts": start, **where}
            else:
                # Just before the end: at its end an event is over, and the arrow would point at what comes next.
                yield {"ph": "f", "bp": "e", **arrow, "ts": round(max(start, stop - 0.1), 1), **where}
