"""Drawn scenes: a few shapes in the four quarters of a small picture, and which colours of shapes are held out."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import cos, pi, sin

import numpy as np

from experiments.packages import package

SIDE = 32  # pixels, of a picture
CELL = SIDE // 2
COLOURS = {
    "red": (220, 50, 40),
    "green": (40, 180, 60),
    "blue": (60, 90, 230),
    "yellow": (230, 210, 50),
    "purple": (160, 60, 190),
    "white": (235, 235, 235),
}
SHAPES = ("circle", "square", "triangle", "star")
SIZES = {"small": 4.0, "large": 7.0}  # pixels from the middle to the rim
PLACES = ("top left", "top right", "bottom left", "bottom right")

PAIRS = tuple(product(COLOURS, SHAPES))
HELD_OUT = (("red", "star"), ("green", "square"), ("blue", "triangle"), ("yellow", "circle"))
SEEN = tuple(pair for pair in PAIRS if pair not in HELD_OUT)

_FINER = 8  # drawn so many times as large, then made smaller: smooth edges
_BACKGROUND = (45, 45, 45)
_SHIFT, _DIMMED, _NOISE = 0.8, 0.15, 5.0  # pixels; of a colour at most; of 255
_CORNERS = {"square": 4, "triangle": 3, "star": 10}


@dataclass(frozen=True)
class Thing:
    """A shape in a quarter of a picture. place: 0 to 3, as PLACES"""

    size: str
    colour: str
    shape: str
    place: int

    @property
    def pair(self) -> tuple[str, str]:
        return self.colour, self.shape

    @property
    def row(self) -> int:
        return self.place // 2

    @property
    def column(self) -> int:
        return self.place % 2


def draw_things(draw: np.random.Generator, split: str, counts: Sequence[int]) -> list[Thing]:
    """Things in their order of place, as many as one of `counts`. None of a scene of `train` has a held-out pair, at
    least one of a scene of `valid` has; those of `any` are drawn from all pairs."""
    count = int(draw.choice(counts))
    places = np.sort(draw.choice(len(PLACES), count, replace=False))
    chosen = int(draw.integers(count))  # which of them is held out, if any is
    things = []
    for number, place in enumerate(places):
        among = SEEN if split == "train" else HELD_OUT if split == "valid" and number == chosen else PAIRS
        colour, shape = among[draw.integers(len(among))]
        things.append(Thing(("small", "large")[draw.integers(2)], colour, shape, int(place)))
    return things


def picture(things: Sequence[Thing], draw: np.random.Generator) -> np.ndarray:
    """A picture of things: uint8 [SIDE, SIDE, 3]. Their places shift and their colours are dimmed a little."""
    canvas = package("PIL.Image")
    image = canvas.new("RGB", (SIDE * _FINER, SIDE * _FINER), _BACKGROUND)
    pencil = package("PIL.ImageDraw").Draw(image)
    for thing in things:
        across, down = ((index + 0.5) * CELL + draw.uniform(-_SHIFT, _SHIFT) for index in (thing.column, thing.row))
        light = 1 - draw.uniform(0, _DIMMED)
        red, green, blue = (round(value * light) for value in COLOURS[thing.colour])
        outline = [((across + x) * _FINER, (down + y) * _FINER) for x, y in _outline(thing)]
        if thing.shape == "circle":
            pencil.ellipse(outline, fill=(red, green, blue))
        else:
            pencil.polygon(outline, fill=(red, green, blue))
    small = np.asarray(image.resize((SIDE, SIDE), canvas.Resampling.BOX), dtype=np.float64)
    return np.clip(small + draw.normal(0, _NOISE, small.shape), 0, 255).round().astype(np.uint8)


def _outline(thing: Thing) -> list[tuple[float, float]]:
    """Corners around the middle, in pixels; of a circle those of the box around it."""
    radius = SIZES[thing.size]
    if thing.shape == "circle":
        return [(-radius, -radius), (radius, radius)]
    count = _CORNERS[thing.shape]
    turn = pi / 4 if thing.shape == "square" else 0.0
    near = 0.4 if thing.shape == "star" else 1.0  # every second corner of a star is nearer
    return [
        (reach * sin(angle), -reach * cos(angle))
        for number in range(count)
        for angle, reach in [(turn + 2 * pi * number / count, radius * (near if number % 2 else 1.0))]
    ]
