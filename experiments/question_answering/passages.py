"""Short passages about who has what and is where, with a question that takes one or two of their sentences."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

PEOPLE: tuple[str, ...] = ("cook", "baker", "doctor", "farmer", "teacher", "pilot", "sailor", "painter")
PEOPLE += ("singer", "tailor", "miller", "hunter", "actor", "nurse", "guard", "clerk")
OBJECTS: tuple[str, ...] = ("lamp", "key", "ball", "book", "cup", "coat", "hat", "rope")
OBJECTS += ("map", "drum", "knife", "ring", "box", "flag", "pen", "clock")
ROOMS: tuple[str, ...] = ("kitchen", "garden", "hall", "attic", "cellar", "shed", "barn", "tower")
ROOMS += ("library", "office", "chapel", "stable", "market", "studio", "school", "harbour")
HELD_OUT = frozenset(  # of who has what, who is where, and where what is
    pair
    for one, other in ((PEOPLE, OBJECTS), (PEOPLE, ROOMS), (OBJECTS, ROOMS))
    for pair in zip(one, other, strict=True)
)
SENTENCES = (2, 3, 4)
CAST = 3  # of each kind, that a passage is about

Relation = tuple[str, str]  # as in HELD_OUT


@dataclass
class World:
    """holder: of an object; room: of a person"""

    holder: dict[str, str] = field(default_factory=dict)
    room: dict[str, str] = field(default_factory=dict)

    def relations(self) -> list[Relation]:
        """All that is so: (person, object), (person, room), (object, room)."""
        held = [(person, thing) for thing, person in self.holder.items()]
        there = [(thing, self.room[person]) for person, thing in held if person in self.room]
        return [*held, *self.room.items(), *there]

    def give(self, thing: str, person: str) -> str:
        """An object changes hands: the sentence about it."""
        before = self.holder.get(thing)
        self.holder[thing] = person
        return (
            f"the {person} has the {thing}." if before is None else f"the {before} gives the {thing} to the {person}."
        )

    def move(self, person: str, room: str) -> str:
        """A person goes to a room: the sentence about it."""
        before = self.room.get(person)
        self.room[person] = room
        return f"the {person} {'is in' if before is None else 'goes to'} the {room}."

    def questions(self) -> Iterator[tuple[int, str, str, Relation]]:
        """All that have one answer: (form, text, answer, what it is about)."""
        people, rooms = list(self.holder.values()), list(self.room.values())
        for thing, person in self.holder.items():
            yield 0, f"who has the {thing}?", f"the {person}", (person, thing)
            if people.count(person) == 1:
                yield 1, f"what does the {person} have?", f"the {thing}", (person, thing)
            if person in self.room:
                yield 2, f"where is the {thing}?", f"the {self.room[person]}", (thing, self.room[person])
        for person, room in self.room.items():
            yield 3, f"where is the {person}?", f"the {room}", (person, room)
            if rooms.count(room) == 1:
                yield 4, f"who is in the {room}?", f"the {person}", (person, room)


FORMS = 5


def draw_passage(draw: np.random.Generator, split: str) -> tuple[str, str, Relation]:
    """A passage with its question, the answer, and what is asked about.

    In a passage of `train` nothing that is held out is ever so; a question of `valid` is about something that is. All
    forms are alike often, and every second answer is not what is named last.
    """
    form, misleading = draw.integers(FORMS), bool(draw.integers(2))
    while True:
        passage, world = _story(draw, split)
        found = [
            (question, answer, relation)
            for number, question, answer, relation in world.questions()
            if number == form
            and (split == "train" or relation in HELD_OUT)
            and (named_last(passage, question) != answer) == misleading
        ]
        if found:
            question, answer, relation = found[draw.integers(len(found))]
            return f"{passage} {question}", answer, relation


def named_last(passage: str, question: str) -> str:
    """The last person, object or room of a passage, whichever is asked for."""
    words = {"who": PEOPLE, "what": OBJECTS, "where": ROOMS}[question.split()[0]]
    return f"the {max(words, key=lambda word: passage.rfind(f'the {word}'))}"


def _story(draw: np.random.Generator, split: str) -> tuple[str, World]:
    """What happens, and how it is in the end."""
    people, objects, rooms = (list(draw.choice(names, CAST, replace=False)) for names in (PEOPLE, OBJECTS, ROOMS))
    world = World()
    sentences: list[str] = []
    wanted = draw.choice(SENTENCES)
    while len(sentences) < wanted:
        person, thing, room = (str(names[draw.integers(CAST)]) for names in (people, objects, rooms))
        after = World(dict(world.holder), dict(world.room))
        if draw.integers(2):
            said, changed = after.give(thing, person), world.holder.get(thing) != person
        else:
            said, changed = after.move(person, room), world.room.get(person) != room
        if changed and (split == "valid" or not HELD_OUT & set(after.relations())):
            world = after
            sentences.append(said)
    return " ".join(sentences), world
