"""The experiment's data and baselines."""

import re
from collections import Counter
from itertools import combinations, combinations_with_replacement
from pathlib import Path

import numpy as np
import pytest

from experiments.drawings import PAIRS, Thing
from experiments.question_answering import baselines, data, passages, scenes
from experiments.question_answering.passages import OBJECTS, PEOPLE, ROOMS, World
from tests.experiments.tools import built, texts


def test_the_samples(tmp_path: Path) -> None:
    train, valid = built(lambda folder, seed: data.build(folder, seed, {"train": 400, "valid": 100}), tmp_path)
    assert (len(train), len(valid)) == (400, 100)
    for place, sample in enumerate(train + valid):
        assert sorted(sample) == (["target.txt", "txt"] if place % 2 else ["png", "target.txt", "txt"])
        assert sample["txt"].startswith(b"<image> ") != bool(place % 2)
        assert 1 <= len(sample["target.txt"].split()) <= 2
    assert set(texts(valid, "target.txt")) & {"yes", "no", "one", "two"} and len(baselines.by_form(train)) == 11
    rows = list(baselines.lines(train, valid))
    assert len(rows) == 2 + 11 + 2 and rows[-1].startswith("| 50 | **all about passages**")


def test_what_is_held_out_of_scenes() -> None:
    """No picture of training has two things that are held out; a held-out question is about one of two such."""
    draw = np.random.default_rng(0)
    seen: Counter[frozenset[tuple[str, str]]] = Counter()
    for _ in range(3000):
        things, _question = scenes.draw_question(draw, "train")
        for one, other in combinations([thing.pair for thing in things], 2):
            assert not scenes.held_out(one, other)
            seen[frozenset((one, other))] += 1
    couples = list(combinations_with_replacement(PAIRS, 2))
    out = [couple for couple in couples if scenes.held_out(*couple)]
    assert len(couples) == 300 and 0.18 < len(out) / len(couples) < 0.22
    assert len(seen) + len(out) == len(couples)
    for pair in PAIRS:
        assert 3 <= sum(pair in couple for couple in out) <= 7
        assert scenes.held_out(pair, PAIRS[0]) == scenes.held_out(PAIRS[0], pair)
    for _ in range(200):
        things, question = scenes.draw_question(draw, "valid")
        there = {thing.pair for thing in things}
        assert set(question.about) <= there and scenes.unseen(things) <= there
        assert set(question.about) & scenes.unseen(things) or (question.answer == "no" and scenes.unseen(things))


def test_answers_about_scenes() -> None:
    things = [
        Thing("small", "red", "star", 0),
        Thing("large", "blue", "star", 1),
        Thing("large", "red", "circle", 2),
    ]
    right = {
        "what colour is the circle?": "red",
        "which shape is blue?": "star",
        "how many red things are there?": "two",
        "how many blue things are there?": "one",
        "how many stars are there?": "two",
        "how many circles are there?": "one",
        "what is left of the blue star?": "red star",
        "what is right of the red star?": "blue star",
        "what is below the red star?": "red circle",
        "what is above the red circle?": "red star",
        "what is below the blue star?": "nothing",
        "is there a red star?": "yes",
        "is there a white star?": "no",
    }
    draw = np.random.default_rng(0)
    asked = {}
    for _ in range(1000):
        for ask in scenes.FORMS:
            if question := ask(things, draw.random(), draw):
                asked[question.text] = question.answer
    assert right.items() <= asked.items()
    rest = {text: answer for text, answer in asked.items() if text not in right}
    assert {answer for text, answer in rest.items() if not text.startswith("is there")} == {"nothing"}
    there = {f"is there a {thing.colour} {thing.shape}?" for thing in things}
    assert {text for text, answer in asked.items() if answer == "yes"} == there


def test_answers_are_alike_often() -> None:
    draw = np.random.default_rng(0)
    counts = Counter(scenes.draw_question(draw, "train")[1].answer for _ in range(2000))
    assert counts["yes"] + counts["no"] == pytest.approx(400, rel=0.2)
    assert counts["yes"] == pytest.approx(counts["no"], rel=0.3)
    assert counts["one"] + counts["two"] + counts["three"] == pytest.approx(400, rel=0.2)
    assert counts["three"] == pytest.approx(400 / 3, rel=0.3)


def test_what_is_held_out_of_passages() -> None:
    assert len(passages.HELD_OUT) == 48
    for one, other in ((PEOPLE, OBJECTS), (PEOPLE, ROOMS), (OBJECTS, ROOMS)):
        assert len({pair for pair in passages.HELD_OUT if pair[0] in one and pair[1] in other}) == 16
    draw = np.random.default_rng(0)
    for _ in range(500):
        assert not relations_told(passages.draw_passage(draw, "train")[0]) & passages.HELD_OUT
    for _ in range(100):
        text, answer, relation = passages.draw_passage(draw, "valid")
        assert relation in passages.HELD_OUT and relation in relations_told(text)
        assert answer.removeprefix("the ") in relation


def relations_told(text: str) -> set[tuple[str, str]]:
    """All that is so at any time of a passage, by its sentences."""
    world, found = World(), set()
    for sentence in text.split(". ")[:-1]:
        words = re.findall(r"the (\w+)", sentence)
        if " has " in sentence or " gives " in sentence:
            world.holder[words[1]] = words[0] if " has " in sentence else words[2]
        else:
            world.room[words[0]] = words[1]
        found |= set(world.relations())
    return found


def test_answers_about_passages() -> None:
    world = World()
    told = [
        world.give("lamp", "baker"),
        world.move("cook", "hall"),
        world.give("lamp", "cook"),
        world.move("cook", "shed"),
        world.move("pilot", "hall"),
    ]
    assert told == [
        "the baker has the lamp.",
        "the cook is in the hall.",
        "the baker gives the lamp to the cook.",
        "the cook goes to the shed.",
        "the pilot is in the hall.",
    ]
    assert {text: answer for _, text, answer, _ in world.questions()} == {
        "who has the lamp?": "the cook",
        "what does the cook have?": "the lamp",
        "where is the lamp?": "the shed",
        "where is the cook?": "the shed",
        "where is the pilot?": "the hall",
        "who is in the shed?": "the cook",
        "who is in the hall?": "the pilot",
    }
    assert passages.named_last(" ".join(told), "where is the lamp?") == "the hall"
    world.give("key", "cook")
    world.move("pilot", "shed")
    ambiguous = ("what does the cook have?", "who is in the shed?")
    assert not {text for _, text, _, _ in world.questions()} & set(ambiguous)


def test_the_last_named_is_right_every_second_time() -> None:
    draw = np.random.default_rng(0)
    right = 0
    for _ in range(400):
        text, answer, _ = passages.draw_passage(draw, "train")
        *told, question = text.split(". ")
        right += passages.named_last(". ".join(told), question) == answer
    assert right == pytest.approx(200, abs=40)


def test_forms_of_questions() -> None:
    lines = ["<image> how many stars are there?", "<image> what is left of the red star?", "the cook is here. who is?"]
    found = baselines.by_form([{"txt": line.encode()} for line in lines])
    assert list(found) == ["how many SHAPEs are there?", "what is SIDE the COLOUR SHAPE?", "who is?"]
