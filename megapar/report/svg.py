"""What all pictures are made of: plain SVG as text, no libraries."""

from html import escape

WIDTH, LEFT, RIGHT = 960, 150, 20
INK, MUTED, GRID, PAPER = "#1f2933", "#6b7684", "#e3e7ec", "#ffffff"
COLOURS = {
    "F": "#4c78a8",
    "B": "#f2a154",
    "I": "#2a9d8f",
    "W": "#b279a2",
    "REDUCE": "#8a9a3b",
    "OPTIMIZER": "#5d6875",
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


def text(x: float, y: float, content: str, anchor: str = "start", colour: str = INK, weight: str = "normal") -> str:
    style = f'text-anchor="{anchor}" fill="{colour}" font-weight="{weight}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(content)}</text>'


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from low to high, about `count` of them."""
    span = (high - low) or 1.0
    step = 10.0 ** (len(f"{span / count:.0f}") - 1) if span >= count else 0.1
    while span / step > count:
        step *= 2.5 if str(step).lstrip("0.").startswith("2") else 2
    first = -(-low // step) * step
    return [first + step * i for i in range(int((high - first) / step + 1e-9) + 1)]


def legend(entries: list[tuple[str, str]], right: float, y: float) -> list[str]:
    body = []
    for colour, name in reversed(entries):
        right -= 6.8 * len(name)
        body.append(text(right, y, name, colour=MUTED))
        right -= 16
        body.append(f'<rect x="{right:.1f}" y="{y - 9:.1f}" width="10" height="10" fill="{colour}"/>')
        right -= 14
    return body
