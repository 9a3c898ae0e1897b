"""Curves over a sweep: panels of one scale in a grid, both axes logarithmic, a band around every line."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from megapar.report.svg import GRID, INK, MUTED, PAPER, document, legend, text

WIDTH, LEFT, RIGHT, TOP, GAP = 960, 76, 24, 64, 26
PANEL_HEIGHT, BELOW = 200, 46


@dataclass(frozen=True)
class Curve:
    """points: (x, y, low, high), all positive. dashed: a computed limit, no measurement."""

    name: str
    colour: str
    points: Sequence[tuple[float, float, float, float]]
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    title: str
    curves: Sequence[Curve] = field(default_factory=list)


def draw_curves(title: str, unit: str, x_name: str, rows: Sequence[Sequence[Panel]]) -> str:
    """SVG of a grid of panels. The panels of a row share their y axis, all share x. Every row has a point."""
    shown = [curve for row in rows for panel in row for curve in panel.curves]
    xs = sorted({point[0] for curve in shown for point in curve.points})
    body = [text(LEFT, 24, title, weight="600")]
    names = {curve.name: curve.colour for curve in shown}
    body += legend([(colour, name) for name, colour in names.items()], WIDTH - RIGHT, 44)
    body.append(text(LEFT, 44, unit, colour=MUTED))
    top = float(TOP)
    for row in rows:
        wide = (WIDTH - LEFT - RIGHT - GAP * (len(row) - 1)) / len(row)
        scale = _Scale.over([v for panel in row for c in panel.curves for p in c.points for v in p[1:]])
        for column, panel in enumerate(row):
            left = LEFT + column * (wide + GAP)
            body += _panel(panel, left, top + 18, wide, xs, scale, labels=column == 0)
        top += PANEL_HEIGHT + BELOW
    body.append(text(WIDTH - RIGHT, top - 8, x_name, "end", MUTED))
    return document(body, WIDTH, top + 8)


@dataclass(frozen=True)
class _Scale:
    """From a value to its share of the height of a panel, logarithmically."""

    low: float
    high: float

    @classmethod
    def over(cls, values: Sequence[float]) -> "_Scale":
        return cls(min(values) / 1.25, max(values) * 1.25)

    def __call__(self, value: float) -> float:
        return math.log(value / self.low) / math.log(self.high / self.low)

    def ticks(self) -> list[float]:
        """Few digits times powers of ten; over many powers only these."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        wide = self.high / self.low
        factors = (1, 2, 3, 4, 5, 7) if wide < 12 else (1, 2, 5) if wide < 200 else (1,)
        every = max(1, round(len(powers) / 6))
        found = [factor * 10.0**power for power in powers if power % every == 0 for factor in factors]
        return [tick for tick in found if self.low <= tick <= self.high]


def _panel(
    panel: Panel, left: float, top: float, wide: float, xs: Sequence[float], scale: _Scale, labels: bool
) -> list[str]:
    bottom = top + PANEL_HEIGHT - 18
    across = _Scale(xs[0] / 1.2, xs[-1] * 1.2)

    def x(value: float) -> float:
        return left + wide * across(value)

    def y(value: float) -> float:
        return bottom - (bottom - top) * scale(value)

    body = [text(left, top - 8, panel.title, colour=INK)]
    for tick in scale.ticks():
        body.append(f'<path d="M{left:.1f} {y(tick):.1f}H{left + wide:.1f}" stroke="{GRID}"/>')
        if labels:
            body.append(text(left - 8, y(tick) + 4, f"{tick:,g}", "end", MUTED))
    last = -math.inf
    for value in xs:
        body.append(f'<path d="M{x(value):.1f} {top:.1f}V{bottom:.1f}" stroke="{GRID}"/>')
        if x(value) - last > 38:
            body.append(text(x(value), bottom + 16, short(value), "middle", MUTED))
            last = x(value)
    for curve in panel.curves:
        line = " ".join(f"{x(p[0]):.1f},{y(p[1]):.1f}" for p in curve.points)
        if curve.dashed:
            body.append(f'<polyline points="{line}" fill="none" stroke="{curve.colour}" stroke-dasharray="5 4"/>')
            continue
        edge = [(p[0], p[2]) for p in curve.points] + [(p[0], p[3]) for p in reversed(curve.points)]
        band = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in edge)
        body.append(f'<polygon points="{band}" fill="{curve.colour}" fill-opacity="0.22"/>')
        body.append(f'<polyline points="{line}" fill="none" stroke="{curve.colour}" stroke-width="1.8"/>')
        for a, b, low, high in curve.points:
            note = f"<title>{curve.name}, {a:,g}: {b:.4g} ({low:.4g} to {high:.4g})</title>"
            mark = f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="3.2" fill="{curve.colour}" stroke="{PAPER}">'
            body.append(mark + note + "</circle>")
    return body


def short(value: float) -> str:
    """1024 as 1k, as token counts are written."""
    return f"{value / 1024:g}k" if value >= 1024 and value % 1024 == 0 else f"{value:,g}"
