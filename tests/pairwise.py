"""Pairwise test cases: few combinations in which every two values of two options meet."""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from typing import Any


def pairwise(
    options: Mapping[str, Sequence[Any]], allowed: Callable[[dict[str, Any]], bool] = lambda case: True
) -> list[dict[str, Any]]:
    """Greedy all-pairs cover of the allowed combinations, the same on every run."""
    names = list(options)
    cases = [case for values in product(*options.values()) if allowed(case := dict(zip(names, values, strict=True)))]

    def pairs(case: dict[str, Any]) -> set[tuple]:
        return {(a, repr(case[a]), b, repr(case[b])) for a, b in combinations(names, 2)}

    missing = set().union(*(pairs(case) for case in cases))
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(pairs(case) & missing))
        missing -= pairs(best)
        chosen.append(best)
    return chosen
