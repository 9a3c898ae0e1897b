"""One picture of a run: the loss over the steps, and what every rank did in the last one."""

import json
from pathlib import Path
from typing import Any

from megapar.report.svg import COLOURS, GRID, LEFT, MUTED, PAPER, RIGHT, WIDTH, document, legend, text, ticks
from megapar.report.timeline import Bar, Lane, draw_lanes


def draw(run_dir: Path) -> Path | None:
    """Draw `run_dir`/run.svg from its metrics.jsonl and timeline.json. None where there is nothing to draw."""
    metrics = run_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    losses = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
    if not losses:
        return None
    held_out = [(row["step"], row["val_loss"]) for row in rows if row.get("val_loss") is not None]
    body, height = _loss_panel(losses, held_out, 30)
    timeline = run_dir / "timeline.json"
    if timeline.exists():
        more, height = _timeline_panel(json.loads(timeline.read_text()), height + 50)
        body += more
    path = run_dir / "run.svg"
    path.write_text(document(body, WIDTH, height), encoding="utf-8")
    return path


def _loss_panel(
    losses: list[tuple[int, float]], held_out: list[tuple[int, float]], top: float
) -> tuple[list[str], float]:
    height = 220.0
    last = max(step for step, _ in losses)
    values = [value for _, value in losses + held_out]
    low, high = min(values), max(values)
    margin = (high - low) * 0.05 or 0.1
    low, high = low - margin, high + margin

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last

    def y(value: float) -> float:
        return top + 20 + height * (high - value) / (high - low)

    body = [text(LEFT, top, "Loss in nats per token", weight="600")]
    for value in ticks(low, high):
        body.append(f'<path d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}" stroke="{GRID}"/>')
        body.append(text(LEFT - 8, y(value) + 4, f"{value:g}", "end", MUTED))
    for step in ticks(0, last, 8):
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


def _timeline_panel(timeline: dict[str, Any], top: float) -> tuple[list[str], float]:
    """One lane per rank: its actions, and under them its waits."""
    spans = [span for rank in timeline["ranks"] for span in rank["spans"] if span["kind"] == "phase"]
    start, stop = min(span["start"] for span in spans), max(span["stop"] for span in spans)
    lanes = []
    for rank in timeline["ranks"]:
        place = rank["place"]
        bars = [
            Bar(span["start"], span["stop"], span["kind"], f"{span['name']}: {1000 * span['seconds']:.1f} ms")
            for span in rank["spans"]
            if (span["kind"] in COLOURS or span["kind"] in ("tp", "dp")) and span["stop"] <= stop
        ]
        lanes.append(Lane(f"pp {place['pp']}  dp {place['dp']}  tp {place['tp']}", bars))
    title = f"Step {timeline['step']}: what every rank did in {1000 * (stop - start):.0f} ms"
    return draw_lanes(title, lanes, start, stop, top)
