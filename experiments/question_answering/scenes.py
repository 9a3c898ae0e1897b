"""Questions about drawn scenes."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from experiments.drawings import COLOURS, PAIRS, SHAPES, Thing, draw_things

COUNTS = (2, 3, 4)  # of things
NUMBERS = ("one", "two", "three")
NOTHING = 0.2  # of the questions what is beside a thing

Pair = tuple[str, str]  # a colour and a shape


@dataclass(frozen=True)
class Question:
    """about: the pairs that the answer depends on; none where it is that there is no such thing"""

    text: str
    answer: str
    about: Collection[Pair]


def held_out(one: Pair, other: Pair) -> bool:
    """Whether no picture of training has these two things: of every five couples one. Each pair of a colour and a shape
    is there in training, and with four of five others."""
    first, second = sorted((PAIRS.index(one), PAIRS.index(other)))
    return (2 * first + second) % 5 == 0


def unseen(things: Sequence[Thing]) -> set[Pair]:
    """What of a scene is beside something that it is never beside in training."""
    couples = combinations([thing.pair for thing in things], 2)
    return {pair for couple in couples if held_out(*couple) for pair in couple}


def draw_question(draw: np.random.Generator, split: str) -> tuple[list[Thing], Question]:
    """A scene and a question about it. A scene of `train` has no two things that are held out; one of `valid` has, and
    the question is about one of them.

    Scenes are drawn until the form, and the answer that is wished of it (by a number from 0 to 1), are possible: so all
    forms are alike often, and so are yes and no, and one, two and three.
    """
    ask, wish = FORMS[draw.integers(len(FORMS))], draw.random()
    while True:
        things = draw_things(draw, "any", COUNTS)
        beside = unseen(things)
        if bool(beside) == (split == "train"):
            continue
        question = ask(things, wish, draw)
        if question is not None and (split == "train" or not question.about or beside & set(question.about)):
            return things, question


def ask_colour(things: Sequence[Thing], wish: float, draw: np.random.Generator) -> Question | None:
    """Of the only thing of its shape; None where there is none."""
    if (thing := _one(_only(things, "shape"), draw)) is None:
        return None
    return Question(f"what colour is the {thing.shape}?", thing.colour, [thing.pair])


def ask_shape(things: Sequence[Thing], wish: float, draw: np.random.Generator) -> Question | None:
    """Of the only thing of its colour; None where there is none."""
    if (thing := _one(_only(things, "colour"), draw)) is None:
        return None
    return Question(f"which shape is {thing.colour}?", thing.shape, [thing.pair])


def ask_number(things: Sequence[Thing], wish: float, draw: np.random.Generator) -> Question | None:
    """Of things of a colour or a shape, as many as is wished; None where there are not as many."""
    kind, values = (("colour", tuple(COLOURS)), ("shape", SHAPES))[wish < 0.5]
    number = 1 + int(2 * len(NUMBERS) * wish) % len(NUMBERS)
    counted = {value: [thing.pair for thing in things if getattr(thing, kind) == value] for value in values}
    chosen = [value for value, found in counted.items() if len(found) == number]
    if not chosen:
        return None
    value = chosen[draw.integers(len(chosen))]
    words = f"{value} things" if kind == "colour" else f"{value}s"
    return Question(f"how many {words} are there?", NUMBERS[number - 1], counted[value])


def ask_beside(things: Sequence[Thing], wish: float, draw: np.random.Generator) -> Question | None:
    """What is beside the only thing of its colour and shape; None where there is nothing, unless that is wished."""
    if (thing := _one(_only(things, "pair"), draw)) is None:
        return None
    side, column, row = SIDES[draw.integers(len(SIDES))]
    beside = [one for one in things if (one.column, one.row) == (thing.column + column, thing.row + row)]
    if bool(beside) == (wish < NOTHING):
        return None
    answer = f"{beside[0].colour} {beside[0].shape}" if beside else "nothing"
    about = [thing.pair, *(one.pair for one in beside)]
    return Question(f"what is {side} the {thing.colour} {thing.shape}?", answer, about)


def ask_presence(things: Sequence[Thing], wish: float, draw: np.random.Generator) -> Question | None:
    """Whether there is a thing of a pair; None where it is not as wished."""
    wished = wish < 0.5
    colour, shape = pair = PAIRS[int(draw.integers(len(PAIRS)))]
    if (pair in [thing.pair for thing in things]) != wished:
        return None
    return Question(f"is there a {colour} {shape}?", "yes" if wished else "no", [pair] if wished else [])


FORMS: tuple[Callable[[Sequence[Thing], float, np.random.Generator], Question | None], ...] = (
    ask_colour,
    ask_shape,
    ask_number,
    ask_beside,
    ask_presence,
)
SIDES = (("left of", -1, 0), ("right of", 1, 0), ("above", 0, -1), ("below", 0, 1))  # (words, columns, rows)


def _only(things: Sequence[Thing], kind: str) -> list[Thing]:
    """Those that share an attribute with no other."""
    values = [getattr(thing, kind) for thing in things]
    return [thing for thing, value in zip(things, values, strict=True) if values.count(value) == 1]


def _one(things: Sequence[Thing], draw: np.random.Generator) -> Thing | None:
    return things[int(draw.integers(len(things)))] if things else None
