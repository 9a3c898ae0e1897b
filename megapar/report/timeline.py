"""What every rank did when, one lane per rank: measured runs and simulated schedules alike."""

from dataclasses import dataclass, field, replace
from html import escape

from megapar.report.svg import COLOURS, GRID, INK, LEFT, MUTED, NAMES, PAPER, RIGHT, WAIT, WIDTH, legend, text, ticks
from megapar.schedule.actions import COMPUTE, Action

_DIGIT = 7.0  # pixels of an action's width for each digit of its micro-batch's number
_WIDEST = 8000.0
IDLE = "idle"


@dataclass(frozen=True)
class Bar:
    """kind: a key of COLOURS, or IDLE: a part of the bubble whose reason is known, shown only to the pointer; anything
    else is a wait inside an action, drawn as a mark along the lower edge.

    start, end: in the timeline's unit; note: shown when the pointer is on it; label: written on it where it fits
    tone: 0 to 1, how pale it is; tells a rank's stages apart
    """

    start: float
    end: float
    kind: str
    note: str
    label: str = ""
    tone: float = 0.0


@dataclass(frozen=True)
class Lane:
    """stop: where the shaded bubble ends; default: with the picture"""

    name: str
    bars: list[Bar] = field(default_factory=list)
    stop: float | None = None


def action_bar(action: Action, start: float, end: float, stages: list[int], note: str) -> Bar:
    """The bar of an action on a rank with these stages: labelled with its micro-batch, in the tone of its stage."""
    label = str(action.microbatch) if action.kind in COMPUTE else ""
    return Bar(start, end, action.kind, note, label, stages.index(action.stage) / max(1, len(stages) - 1))


def readable_width(lanes: list[Lane], start: float, stop: float) -> float:
    """The width of a picture in which three of four bars have room for their number, within limits."""
    bars = [bar for lane in lanes for bar in lane.bars if bar.label and bar.end > bar.start]
    if not bars:
        return WIDTH
    length = sorted(bar.end - bar.start for bar in bars)[len(bars) // 4]
    digits = max(len(bar.label) for bar in bars)
    return min(_WIDEST, max(WIDTH, LEFT + RIGHT + (_DIGIT * digits + 1) * (stop - start) / length))


def draw_lanes(
    title: str,
    lanes: list[Lane],
    start: float,
    stop: float,
    top: float,
    *,
    width: float = WIDTH,
    unit: str = "",
    per_unit: float = 1.0,
) -> tuple[list[str], float]:
    """A panel from `top` down, with a legend of what is in it. Returns its SVG elements and where it ends.

    What no bar covers is left in the shade of the lane: the bubble. unit: write the time below, times per_unit.
    """
    row, gap = (26.0, 6.0) if len(lanes) <= 16 else (14.0, 2.0)
    scale = (width - LEFT - RIGHT) / ((stop - start) or 1.0)
    lanes = _labelled_alike(lanes, scale, min(10.0, row - 3))
    used = {bar.kind for lane in lanes for bar in lane.bars} - {IDLE}
    entries = [(COLOURS[kind], name) for kind, name in NAMES.items() if kind in used]
    if used - COLOURS.keys():
        entries.append((WAIT, "waiting for communication"))
    if any(bar.tone for lane in lanes for bar in lane.bars):
        title += " (pale: a rank's later stages)"
    body = [text(LEFT, top, title, weight="600")]
    top += 22
    # At the right edge of what a screen shows at once: a wide picture is scrolled.
    body += legend([*entries, (GRID, "idle: the bubble")], min(width, WIDTH) - RIGHT, top)
    for index, lane in enumerate(lanes):
        y = top + 20 + index * (row + gap)
        body.append(text(LEFT - 8, y + row / 2 + 4, lane.name, "end", MUTED))
        shade = (min(stop, stop if lane.stop is None else lane.stop) - start) * scale
        body.append(f'<rect x="{LEFT}" y="{y}" width="{shade:.1f}" height="{row}" fill="{GRID}"/>')
        for bar in sorted(lane.bars, key=lambda bar: bar.kind not in COLOURS):
            body += _bar(bar, LEFT + (bar.start - start) * scale, y, (bar.end - bar.start) * scale, row)
    bottom = top + 20 + len(lanes) * (row + gap)
    if unit:
        for value in ticks(0, (stop - start) * per_unit, max(10, int(width / 100))):
            body.append(text(LEFT + value / per_unit * scale, bottom + 12, f"{value:g}", "middle", MUTED))
        body.append(text(LEFT - 8, bottom + 12, unit, "end", MUTED))
        bottom += 18
    return body, bottom + 14


def _room_for(label: str, font: float) -> float:
    return 0.6 * font * len(label) + 1


def _labelled_alike(lanes: list[Lane], scale: float, font: float) -> list[Lane]:
    """Without labels where most of the long ones find no room: short ones alone would read as a count that stops."""
    longest = max((len(bar.label) for lane in lanes for bar in lane.bars), default=0)
    bars = [bar for lane in lanes for bar in lane.bars if longest > 1 and len(bar.label) == longest]
    if 2 * sum((bar.end - bar.start) * scale >= _room_for(bar.label, font) for bar in bars) >= len(bars):
        return lanes
    return [replace(lane, bars=[replace(bar, label="") for bar in lane.bars]) for lane in lanes]


def _bar(bar: Bar, x: float, y: float, width: float, height: float) -> list[str]:
    """An action as a full bar, a wait inside it as a mark along the lower edge."""
    note = f"<title>{escape(bar.note)}</title>"
    if bar.kind == IDLE:
        size = f'x="{x:.2f}" y="{y:.1f}" width="{width:.2f}" height="{height:.1f}"'
        return [f'<rect {size} fill="none" pointer-events="all">{note}</rect>'] if width >= 1 else []
    if bar.kind not in COLOURS:
        y, height = y + height * 0.7, height * 0.3
        size = f'x="{x:.2f}" y="{y:.1f}" width="{max(width, 0.2):.2f}" height="{height:.1f}"'
        return [f'<rect {size} fill="{WAIT}">{note}</rect>']
    size = f'x="{x:.2f}" y="{y:.1f}" width="{max(width - 0.4, 0.2):.2f}" height="{height:.1f}"'
    drawn = [f'<rect {size} fill="{PAPER}"/>'] if bar.tone else []
    pale = f' fill-opacity="{1 - 0.6 * bar.tone:.2f}"' if bar.tone else ""
    drawn.append(f'<rect {size} fill="{COLOURS[bar.kind]}"{pale}>{note}</rect>')
    font = min(10.0, height - 3)
    if bar.label and width >= _room_for(bar.label, font):
        colour = INK if bar.tone > 0.25 or bar.kind == "B" else PAPER  # what can be read on it
        place = f'x="{x + width / 2:.1f}" y="{y + height / 2 + 0.35 * font:.1f}" font-size="{font:g}" fill="{colour}"'
        drawn.append(f'<text {place} text-anchor="middle" pointer-events="none">{escape(bar.label)}</text>')
    return drawn
