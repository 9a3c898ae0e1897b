"""Pairwise test cases: few combinations in which every two values of two options meet."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest


def pairwise(
    options: Mapping[str, Sequence[Any]], allowed: Callable[[dict[str, Any]], bool] | None = None
) -> list[dict[str, Any]]:
    """Greedy all-pairs cover of the allowed combinations, the same on every run.

    Each case is the first in the order of the product that brings most pairs that have not met. How many it would
    bring is kept for every case in a grid, an axis per option; the cases with one pair are a slice of it.
    """
    names, shape = list(options), tuple(map(len, options.values()))
    possible = np.ones(shape, dtype=bool)
    if allowed is not None:
        every = [allowed(dict(zip(names, values, strict=True))) for values in product(*options.values())]
        possible = np.array(every, dtype=bool).reshape(shape)
    missing = {pair for pair in _pairs_of_values(shape) if possible[_with(pair, len(shape))].any()}
    brings = np.zeros(shape, dtype=np.int32)
    for pair in missing:
        brings[_with(pair, len(shape))] += 1
    brings[~possible] = -1
    chosen = []
    while missing:
        best = tuple(map(int, np.unravel_index(brings.argmax(), shape)))
        for pair in missing & {((a, best[a]), (b, best[b])) for a, b in combinations(range(len(shape)), 2)}:
            missing.remove(pair)
            brings[_with(pair, len(shape))] -= 1
        chosen.append({name: options[name][value] for name, value in zip(names, best, strict=True)})
    return chosen


Pair = tuple[tuple[int, int], tuple[int, int]]  # (option, value) twice, by number


def _pairs_of_values(shape: tuple[int, ...]) -> Iterator[Pair]:
    for a, b in combinations(range(len(shape)), 2):
        for value_a, value_b in product(range(shape[a]), range(shape[b])):
            yield (a, value_a), (b, value_b)


def _with(pair: Pair, options: int) -> tuple[int | slice, ...]:
    """The index of the cases that have a pair."""
    chosen = dict(pair)
    return tuple(chosen.get(option, slice(None)) for option in range(options))


def parameters(cases: Sequence[dict[str, Any]], *covered: str) -> list[Any]:
    """Cases for pytest, with names. `make test` runs those that first have a value of these options; `more` the rest.

    Greedy: a case is kept back where all its values of the options have been met.
    """
    met, found = set[tuple[str, str]](), []
    for case in cases:
        new = {(name, repr(case[name])) for name in covered} - met
        met |= new
        name = "-".join(str(value) for value in case.values())
        found.append(pytest.param(case, id=name, marks=[] if new else [pytest.mark.more]))
    return found
