"""The state that an optimizer keeps beside the weights, laid out like what a rank owns of its buckets."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

_ALIGN = 16  # elements: vector instructions want a run to begin at a multiple


class Runs:
    """State of some runs of a bucket's owned part alone, one behind the other; other elements have none.

    Indexed as a tensor of the whole owned part would be: `state[run]` is a view, or None where there is none.
    """

    def __init__(self, runs: Sequence[slice], like: Tensor) -> None:
        self.runs = sorted(runs, key=lambda run: run.start)
        self.places = [0, *accumulate(map(_room, self.runs))]
        self.tensor = torch.zeros(self.places[-1], dtype=like.dtype, device=like.device)

    def __getitem__(self, run: slice, /) -> Tensor | None:
        number = bisect_right([one.start for one in self.runs], run.start) - 1
        if number < 0 or run.start >= self.runs[number].stop:
            return None
        place = self.places[number] + run.start - self.runs[number].start
        return self.tensor[place : place + run.stop - run.start]


def _room(run: slice) -> int:
    return -(-(run.stop - run.start) // _ALIGN) * _ALIGN


Chosen = Sequence[tuple[int, slice]] | None  # (bucket, run in its owned part); None: all


def zeros(owned: Sequence[Tensor], chosen: Chosen) -> list[Tensor] | list[Runs]:
    """State for what is chosen of the owned part of every bucket, [n] each."""
    if chosen is None:
        return [torch.zeros_like(part) for part in owned]
    return [Runs([run for one, run in chosen if one == bucket], part) for bucket, part in enumerate(owned)]


def size_of(owned: Sequence[Tensor], chosen: Chosen) -> int:
    """Elements of `zeros`."""
    return sum(map(len, owned)) if chosen is None else sum(_room(run) for _, run in chosen)
