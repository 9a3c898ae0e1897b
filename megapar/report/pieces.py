"""A pass through a layer: what a rank multiplied when, and what was on the link meanwhile."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from megapar.report.svg import COLOURS, GRID, INK, LEFT, MUTED, PAPER, RIGHT, WAIT, WIDTH, document, legend, text, ticks
from megapar.trace.spans import FLIGHT

_MATMUL, _LINK = COLOURS["F"], COLOURS["B"]
_ROW, _GAP = 26.0, 6.0


@dataclass(frozen=True)
class Walk:
    """Seconds of forward and backward, and the spans (kind, name, start, stop) from its start on."""

    forward: float
    backward: float
    spans: list[tuple[str, str, float, float]]

    def computed(self) -> list[tuple[str, str, float, float]]:
        return [span for span in self.spans if span[0] in ("matmul", "tp")]

    def in_flight(self) -> list[tuple[str, str, float, float]]:
        """A collective that was waited for from its start on has no span but that of the wait."""
        flights = [span for span in self.spans if span[0] == FLIGHT]
        waits = [(FLIGHT, *span[1:]) for span in self.spans if span[0] == "tp"]
        return flights + [wait for wait in waits if all(flight[1] != wait[1] for flight in flights)]


def draw_walks(title: str, walks: Mapping[str, Walk]) -> str:
    """SVG: two lanes for each engine, on one scale."""
    longest = max(walk.forward + walk.backward for walk in walks.values())
    scale = (WIDTH - LEFT - RIGHT) / longest
    body = [text(LEFT, 24, title, weight="600")]
    names = {"matmul": _MATMUL, "collective in flight": _LINK, "waiting for it": WAIT}
    body += legend([(colour, name) for name, colour in names.items()], WIDTH - RIGHT, 46)
    top = 62.0
    for engine, walk in walks.items():
        for name, spans in (("rank 0", walk.computed()), ("its link", walk.in_flight())):
            body.append(text(LEFT - 8, top + _ROW / 2 + 4, f"{engine}: {name}", "end", MUTED))
            stop = (walk.forward + walk.backward) * scale
            body.append(f'<rect x="{LEFT}" y="{top}" width="{stop:.1f}" height="{_ROW}" fill="{GRID}"/>')
            body += _bars(spans, scale, top)
            top += _ROW + _GAP
        middle = LEFT + walk.forward * scale
        line = f'x1="{middle:.1f}" x2="{middle:.1f}" y1="{top - 2 * (_ROW + _GAP):.1f}" y2="{top - _GAP:.1f}"'
        body.append(f'<line {line} stroke="{INK}" stroke-dasharray="3 2"/>')
        took = f"forward {1e3 * walk.forward:.0f} ms, backward {1e3 * walk.backward:.0f} ms"
        body.append(text(LEFT, top + 8, f"{engine}: {took}", colour=MUTED))
        top += 26
    for value in ticks(0, 1e3 * longest, 10):
        body.append(text(LEFT + value / 1e3 * scale, top + 6, f"{value:g}", "middle", MUTED))
    body.append(text(LEFT - 8, top + 6, "ms", "end", MUTED))
    return document(body, WIDTH, top + 20)


def _bars(spans: Sequence[tuple[str, str, float, float]], scale: float, top: float) -> list[str]:
    drawn, free = [], 0.0
    for kind, name, begun, stop in sorted(spans, key=lambda span: (span[2], span[3])):
        start = max(begun, free) if kind == FLIGHT else begun  # a link carries one at a time
        free = max(free, stop)
        x, width = LEFT + start * scale, max(0.3, (stop - start) * scale - 0.6)
        y, height = (top + 0.7 * _ROW, 0.3 * _ROW) if kind == "tp" else (top, _ROW)
        colour = {"matmul": _MATMUL, FLIGHT: _LINK}.get(kind, WAIT)
        note = f"<title>{escape(name)}: {1e3 * (stop - begun):.1f} ms</title>"
        size = f'x="{x:.2f}" y="{y:.1f}" width="{width:.2f}" height="{height:.1f}"'
        drawn.append(f'<rect {size} fill="{colour}">{note}</rect>')
        label = name.rsplit(" ", 1)[-1]
        if kind != "tp" and "/" in label and width > 7 * len(label):
            ink = INK if kind == FLIGHT else PAPER
            place = f'x="{x + width / 2:.1f}" y="{top + _ROW / 2 + 3.5:.1f}" font-size="10" fill="{ink}"'
            drawn.append(f'<text {place} text-anchor="middle" pointer-events="none">{label}</text>')
    return drawn
