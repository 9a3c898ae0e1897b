"""One picture of a run: the loss over the steps; what every rank did in one of them, and what simulation says."""

import json
import math
from functools import partial
from pathlib import Path

from megapar.config.layout import AXES, INSIDE_STAGES
from megapar.files import write_atomic
from megapar.report.svg import COLOURS, GRID, LEFT, MUTED, PAPER, RIGHT, WIDTH, document, legend, text, ticks
from megapar.report.timeline import IDLE, Bar, Lane, action_bar, draw_lanes, readable_width
from megapar.schedule.actions import Action
from megapar.schedule.simulate import simulate
from megapar.trace.file import RankTrace, Trace, read

MOST_LANES = 32  # of a run with more ranks one pipeline is drawn


def draw(run_dir: Path) -> Path | None:
    """Draw `run_dir`/run.svg from its metrics.jsonl and trace.json. None where there is nothing to draw."""
    metrics = run_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    losses = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
    if not losses:
        return None
    held_out = [(row["step"], row["val_loss"]) for row in rows if row.get("val_loss") is not None]
    summary = run_dir / "summary.json"
    unit = json.loads(summary.read_text()).get("loss_unit", "nats/token") if summary.exists() else "nats/token"
    body, height = _loss_panel(losses, held_out, unit, 30)
    width: float = WIDTH
    if (traced := run_dir / "trace.json").exists():
        more, width, height = _timeline_panels(read(traced), height + 50)
        body += more
    path = run_dir / "run.svg"
    write_atomic(path, document(body, width, height))
    return path


def _loss_panel(
    losses: list[tuple[int, float]], held_out: list[tuple[int, float]], unit: str, top: float
) -> tuple[list[str], float]:
    height = 220.0
    first, last = min(step for step, _ in losses) - 1, max(step for step, _ in losses)  # from where the run began
    values = [value for _, value in losses + held_out]
    low, high = min(values), max(values)
    margin = (high - low) * 0.05 or 0.1
    low, high = low - margin, high + margin

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (step - first) / (last - first)

    def y(value: float) -> float:
        return top + 20 + height * (high - value) / (high - low)

    body = [text(LEFT, top, f"Loss in {unit.replace('/', ' per ')}", weight="600")]
    for value in ticks(low, high, 6):
        body.append(f'<path d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}" stroke="{GRID}"/>')
        body.append(text(LEFT - 8, y(value) + 4, f"{value:g}", "end", MUTED))
    for step in (step for step in ticks(first, last, 10) if step == int(step)):
        body.append(text(x(step), top + height + 38, f"{step:g}", "middle", MUTED))
    body.append(text(LEFT - 8, top + height + 38, "step", "end", MUTED))
    points = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in losses)
    body.append(f'<polyline points="{points}" fill="none" stroke="{COLOURS["F"]}" stroke-width="1.5"/>')
    for step, value in held_out:
        body.append(
            f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="4" fill="{COLOURS["B"]}" stroke="{PAPER}">'
            f"<title>validation, step {step}: {value:.4f}</title></circle>"
        )
    entries = [(COLOURS["F"], "training")] + ([(COLOURS["B"], "validation")] if held_out else [])
    body += legend(entries, WIDTH - RIGHT, top)
    return body, top + height + 44


def _timeline_panels(trace: Trace, top: float) -> tuple[list[str], float, float]:
    """The last traced step as it was, and below it its schedule replayed with what the actions took, to one scale.

    Returns the elements, the width and where they end.
    """
    step = trace.steps[-1]
    simulation = simulate(trace.schedule, trace.costs())
    drawn = trace.ranks
    if len(drawn) > MOST_LANES:
        drawn = [rank for rank in drawn if not any(rank.place[axis] for axis in INSIDE_STAGES)]
    spans = [span for rank in drawn for span in rank.steps[step]]
    start = min(span.start for span in spans)
    stop = max(*(span.stop for span in spans), start + simulation.step_time)
    measured = [_measured_lane(trace, rank, step) for rank in drawn]
    replayed = [
        Lane(
            f"pp {rank}",
            [
                action_bar(
                    action, start + begin, start + end, trace.schedule.stages_of(rank), _note(str(action), end - begin)
                )
                for begin, end, action in row
            ],
            start + simulation.step_time,
        )
        for rank, row in enumerate(simulation.spans)
    ]
    width = readable_width(replayed, start, stop)
    took, foreseen = trace.phase(step), simulation.step_time
    title = (
        f"Step {step}, {trace.name}: pipeline {_ms(took)} measured, {_ms(foreseen)} simulated; "
        f"bubble {trace.bubble(step):.1%} measured, {simulation.mean_bubble:.1%} simulated"
    )
    firsts = ", ".join(f"{axis} 0" for axis in INSIDE_STAGES if trace.layout[axis] > 1)
    who = "every rank" if len(drawn) == len(trace.ranks) else f"{firsts} of {len(trace.ranks)} ranks"
    first, last = trace.steps[0], trace.steps[-1]
    of = f"of step {step}" if first == last else f"over steps {first} to {last}"
    panel = partial(draw_lanes, start=start, stop=stop, width=width, unit="ms", per_unit=1000.0)
    body = [text(LEFT, top, title, weight="600")]
    for stage, parts in enumerate(trace.parts):
        top += 18
        body.append(text(LEFT, top, f"stage {stage}, on pp {trace.schedule.placement[stage]}: {parts}", colour=MUTED))
    above, bottom = panel(f"Measured: what {who} did", measured, top=top + 24)
    below, bottom = panel(f"Simulated: the same schedule with the median costs {of}", replayed, top=bottom + 20)
    return body + above + below, width, bottom


def _measured_lane(trace: Trace, rank: RankTrace, step: int) -> Lane:
    """A rank's actions, the waits inside them as marks, and its waits between them as the hover of the bubble."""
    place, stages, spans = rank.place, trace.schedule.stages_of(rank.place["pp"]), rank.steps[step]
    # The optimizer begins with the gradient norm, for which all ranks meet: until the last is there the others idle.
    met = max((span.stop for span in spans if span.kind == "world"), default=-math.inf)
    bars = []
    for span in spans:
        note = _note(span.name, span.seconds)
        if span.kind == "OPTIMIZER":
            bars.append(
                Bar(max(span.start, met), span.stop, span.kind, _note(span.name, span.stop - max(span.start, met)))
            )
        elif span.kind in INSIDE_STAGES:
            bars.append(Bar(span.start, span.stop, span.kind, note))
        elif span.kind in ("RECV_F", "RECV_B", "world"):
            bars.append(Bar(span.start, span.stop, IDLE, f"waiting, {note}"))
        elif span.kind in COLOURS:
            bars.append(action_bar(Action.parse(span.name), span.start, span.stop, stages, note))
    name = "  ".join(f"{axis} {index}" for axis, index in place.items() if AXES[axis].splits or trace.layout[axis] > 1)
    return Lane(name, bars, max(span.stop for span in spans))


def _note(what: str, seconds: float) -> str:
    return f"{what}: {1000 * seconds:.1f} ms"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.{1 if seconds < 0.1 else 0}f} ms"
