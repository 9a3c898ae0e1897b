"""Deadlines of the acceptance fit into its seconds, and who comes late has its part, by a clock of the test's own."""

import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from experiments.gpu import children
from experiments.gpu.children import GRACE_S, LEAST_S, Plan, run_waves
from experiments.gpu.command import SECONDS
from experiments.gpu.section import Section, find
from experiments.gpu.table import Row

LOOKS_EVERY = 0.03  # seconds, more or less, after which `run_wave` looks again who is over


class Acceptance:
    """A run on a card in which no section does anything.

    hangs: whether a section takes all that it gets and is killed, or else `takes` of its own seconds
    """

    def __init__(self, seconds: float, width: int, takes: float, hangs: bool) -> None:
        self.now, self.end, self.given, rows = 0.0, 0.0, dict[str, float](), list[Row]()
        acceptance = self

        class Child:
            def __init__(self, file: str, section: Section, seconds: float, plan: Plan) -> None:
                self.section, self.begun = section, acceptance.now
                acceptance.given[section.name] = seconds
                self.limit = acceptance.now + (seconds + GRACE_S if hangs else min(seconds, takes * section.seconds))

            def is_over(self) -> bool:
                return acceptance.now >= self.limit

            def rows(self) -> list[Row]:
                return []

            def end(self, plan: Plan) -> list[Row]:
                acceptance.end = acceptance.now
                return []

            kill = rows

        sections = list(find()[0].values())
        waves = [[one for one in sections if one[1].wave == number] for number in sorted({s.wave for _, s in sections})]
        clock: dict[str, Any] = {"monotonic": lambda: self.now, "sleep": self.sleep}
        with mock.patch.object(children, "Child", Child), mock.patch.multiple(time, **clock):
            run_waves(waves, Plan(Path(), "cuda", 0, {}, width), seconds, rows.append)
        self.skipped = [row["section"] for row in rows]

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def asked() -> dict[str, float]:
    return {name: section.seconds for name, (_, section) in find()[0].items()}


@pytest.mark.parametrize("width", [4, 6])
@pytest.mark.parametrize("seconds", [240, 360, SECONDS, 600])
def test_whoever_hangs_the_others_have_their_time(seconds: float, width: int) -> None:
    run = Acceptance(seconds, width, takes=1.0, hangs=True)
    assert run.skipped == [] and run.given.keys() == asked().keys()
    assert run.end <= seconds + LOOKS_EVERY
    assert min(run.given.values()) >= LEAST_S
    assert all(given <= asked()[name] for name, given in run.given.items())


def test_the_last_section_has_most_of_its_seconds() -> None:
    """transformers' model, beside which ours is judged, though every section before it hangs."""
    assert Acceptance(SECONDS, 6, takes=1.0, hangs=True).given["llama"] >= 0.75 * asked()["llama"]


@pytest.mark.parametrize("width", [4, 6])
def test_what_is_not_used_is_for_those_behind(width: int) -> None:
    run = Acceptance(SECONDS, width, takes=0.3, hangs=False)
    assert run.given["llama"] == asked()["llama"] and run.given["profile"] >= 0.9 * asked()["profile"]
