"""What all pictures are made of: plain SVG as text, no libraries."""

import math
from html import escape

WIDTH, LEFT, RIGHT = 960, 150, 20
INK, MUTED, GRID, PAPER = "#1f2933", "#6b7684", "#e3e7ec", "#ffffff"
COLOURS = {
    "F": "#4c78a8",
    "B": "#f2a154",
    "I": "#26b095",
    "W": "#b279a2",
    "REDUCE": "#8a9a3b",
    "OPTIMIZER": "#4a4f57",
}
WAIT = "#7d2e2e"
NAMES = {
    "F": "forward",
    "B": "backward",
    "I": "input gradient",
    "W": "weight gradient",
    "REDUCE": "gradient reduction",
    "OPTIMIZER": "optimizer",
}


def document(body: list[str], width: float, height: float) -> str:
    """A whole SVG file."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" font-family="system-ui, sans-serif" font-size="12" fill="{INK}">'
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="{PAPER}"/>' + "".join(body) + "</svg>\n"
    )


def page(title: str, body: list[str], width: float, height: float) -> str:
    """The same as an HTML page: a wide picture is scrolled inside the window, and what is left of the lanes stays."""
    names = [element for element in body if element.startswith(f'<text x="{LEFT - 8:.1f}"')]
    rest = [element for element in body if element not in names]
    size = f'width="{LEFT - 6}" height="{height:.0f}"'
    column = (
        f'<svg {size} font-family="system-ui, sans-serif" font-size="12"><rect {size} fill="{PAPER}"/>'
        f"{''.join(names)}</svg>"
    )
    style = (
        "body{margin:0}.picture{position:relative;overflow-x:auto;width:100vw}svg{display:block}"
        f".names{{position:sticky;left:0;width:{LEFT}px;height:0;overflow:visible;z-index:1}}"
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<style>{style}</style></head><body>\n<div class="picture"><div class="names">{column}</div>\n'
        f"{document(rest, width, height)}</div></body></html>\n"
    )


def text(x: float, y: float, content: str, anchor: str = "start", colour: str = INK, weight: str = "normal") -> str:
    style = f'text-anchor="{anchor}" fill="{colour}" font-weight="{weight}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(content)}</text>'


def ticks(low: float, high: float, most: int = 8) -> list[float]:
    """Round numbers from low to high, at most `most` steps of 1, 2 or 5 times a power of ten apart."""
    span = (high - low) or 1.0
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [step * number for number in range(first, last + 1)]


def legend(entries: list[tuple[str, str]], right: float, y: float) -> list[str]:
    body = []
    for colour, name in reversed(entries):
        right -= 6.8 * len(name)
        body.append(text(right, y, name, colour=MUTED))
        right -= 16
        body.append(f'<rect x="{right:.1f}" y="{y - 9:.1f}" width="10" height="10" fill="{colour}"/>')
        right -= 14
    return body
