"""The cover of all pairs is one, and the same greedy one as by trying every combination."""

from itertools import combinations, product
from typing import Any

import pytest

from tests.pairwise import pairwise

OPTIONS: dict[str, list[Any]] = {"a": [1, 2, 3], "b": [[1], [1, 2]], "c": [None, 0.5], "d": ["x", "y", "z", "w"]}


def never_alone(case: dict[str, Any]) -> bool:
    """b and c bind each other in some rows of a only, and one pair (a=3 with d=w) is in no allowed case."""
    return not (case["a"] == 1 and case["b"] == [1] and case["c"] is None) and (case["a"], case["d"]) != (3, "w")


def pairs(case: dict[str, Any]) -> set[tuple]:
    return {(a, repr(case[a]), b, repr(case[b])) for a, b in combinations(case, 2)}


def by_trying(allowed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    missing, chosen = set[tuple]().union(*map(pairs, allowed)), []
    while missing:
        chosen.append(max(allowed, key=lambda case: len(pairs(case) & missing)))
        missing -= pairs(chosen[-1])
    return chosen


@pytest.mark.parametrize("allowed", [None, never_alone])
def test_every_allowed_pair_occurs(allowed: Any) -> None:
    every = [dict(zip(OPTIONS, values, strict=True)) for values in product(*OPTIONS.values())]
    every = [case for case in every if allowed is None or allowed(case)]
    found = pairwise(OPTIONS, allowed)
    assert set().union(*map(pairs, found)) == set().union(*map(pairs, every))
    assert all(case in every for case in found)
    assert found == by_trying(every)
    assert 12 <= len(found) <= 14  # 12 pairs of a and d


def test_nothing_is_allowed() -> None:
    assert pairwise(OPTIONS, lambda case: False) == []


def test_a_large_product_is_covered() -> None:
    """4^9 combinations: too many to try each for every case."""
    options = {name: list(range(4)) for name in "abcdefghi"}
    found = pairwise(options)
    assert set().union(*map(pairs, found)) == {
        (a, repr(i), b, repr(j)) for a, b in combinations(options, 2) for i in range(4) for j in range(4)
    }
    assert len(found) < 40
