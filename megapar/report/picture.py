"""One picture of a run: the loss over the steps, and what every rank did in the last one. Plain SVG, no libraries."""

import json
from html import escape
from pathlib import Path
from typing import Any

WIDTH, LEFT, RIGHT = 960, 150, 20
INK, MUTED, GRID, PAPER = "#1f2933", "#6b7684", "#e3e7ec", "#ffffff"
COLOURS = {"F": "#4c78a8", "B": "#f2a154", "I": "#f2a154", "W": "#b279a2", "REDUCE": "#6aa84f"}
WAIT = "#7d2e2e"
NAMES = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient", "REDUCE": "gradient reduction"}


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
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="{INK}">'
        f'<rect width="{WIDTH}" height="{height}" fill="{PAPER}"/>'
    )
    path = run_dir / "run.svg"
    path.write_text(head + "".join(body) + "</svg>\n", encoding="utf-8")
    return path


def _text(x: float, y: float, text: str, anchor: str = "start", colour: str = INK, weight: str = "normal") -> str:
    style = f'text-anchor="{anchor}" fill="{colour}" font-weight="{weight}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from low to high, about `count` of them."""
    span = (high - low) or 1.0
    step = 10.0 ** (len(f"{span / count:.0f}") - 1) if span >= count else 0.1
    while span / step > count:
        step *= 2.5 if str(step).lstrip("0.").startswith("2") else 2
    first = -(-low // step) * step
    return [first + step * i for i in range(int((high - first) / step + 1e-9) + 1)]


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

    body = [_text(LEFT, top, "Loss in nats per token", weight="600")]
    for value in _ticks(low, high):
        body.append(f'<path d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}" stroke="{GRID}"/>')
        body.append(_text(LEFT - 8, y(value) + 4, f"{value:g}", "end", MUTED))
    for step in _ticks(0, last, 8):
        body.append(_text(x(step), top + height + 38, f"{step:g}", "middle", MUTED))
    body.append(_text(LEFT - 8, top + height + 38, "step", "end", MUTED))
    points = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in losses)
    body.append(f'<polyline points="{points}" fill="none" stroke="{COLOURS["F"]}" stroke-width="1.5"/>')
    for step, value in held_out:
        body.append(
            f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="4" fill="{COLOURS["B"]}" stroke="{PAPER}">'
            f"<title>validation, step {step}: {value:.4f}</title></circle>"
        )
    entries = [(COLOURS["F"], "training")] + ([(COLOURS["B"], "validation")] if held_out else [])
    body += _legend(entries, WIDTH - RIGHT, top)
    return body, top + height + 44


def _legend(entries: list[tuple[str, str]], right: float, y: float) -> list[str]:
    body = []
    for colour, name in reversed(entries):
        right -= 6.8 * len(name)
        body.append(_text(right, y, name, colour=MUTED))
        right -= 16
        body.append(f'<rect x="{right:.1f}" y="{y - 9:.1f}" width="10" height="10" fill="{colour}"/>')
        right -= 14
    return body


def _timeline_panel(timeline: dict[str, Any], top: float) -> tuple[list[str], float]:
    """One row per rank; what is not computing is left pale: the bubble."""
    ranks = timeline["ranks"]
    row, gap = (26.0, 6.0) if len(ranks) <= 16 else (12.0, 2.0)
    phases = [span for rank in ranks for span in rank["spans"] if span["kind"] == "phase"]
    start, stop = min(span["start"] for span in phases), max(span["stop"] for span in phases)
    scale = (WIDTH - LEFT - RIGHT) / (stop - start)
    title = f"Step {timeline['step']}: what every rank did in {1000 * (stop - start):.0f} ms"
    used = {span["kind"] for rank in ranks for span in rank["spans"]}
    entries = [(COLOURS[kind], name) for kind, name in NAMES.items() if kind in used]
    body = [_text(LEFT, top, title, weight="600")]
    top += 22
    body += _legend([*entries, (WAIT, "waiting for communication"), (GRID, "idle")], WIDTH - RIGHT, top)
    for index, rank in enumerate(ranks):
        y = top + 20 + index * (row + gap)
        place = rank["place"]
        name = f"stage {place['pp']}  dp {place['dp']}  tp {place['tp']}"
        body.append(_text(LEFT - 8, y + row / 2 + 4, name, "end", MUTED))
        body.append(f'<rect x="{LEFT}" y="{y}" width="{WIDTH - LEFT - RIGHT}" height="{row}" fill="{GRID}"/>')
        body += [
            _bar(span, LEFT + (span["start"] - start) * scale, y, span["seconds"] * scale, row)
            for span in sorted(rank["spans"], key=lambda span: span["kind"] not in COLOURS)
            if (span["kind"] in COLOURS or span["kind"] in ("tp", "dp")) and span["stop"] <= stop
        ]
    return body, top + 20 + len(ranks) * (row + gap) + 14


def _bar(span: dict[str, Any], x: float, y: float, width: float, height: float) -> str:
    """An action as a full bar, a wait inside it as a mark along the lower edge."""
    waits = span["kind"] not in COLOURS
    y, height = (y + height * 0.7, height * 0.3) if waits else (y, height)
    colour = WAIT if waits else COLOURS[span["kind"]]
    note = f"{span['name']}: {1000 * span['seconds']:.1f} ms"
    return (
        f'<rect x="{x:.2f}" y="{y:.1f}" width="{max(width - (0 if waits else 0.4), 0.2):.2f}" height="{height:.1f}" '
        f'fill="{colour}"><title>{escape(note)}</title></rect>'
    )
