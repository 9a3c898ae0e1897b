"""Who sits where: the ranks of a run as a grid with the axes of `megapar.config.layout`.

A `Mesh` is an object that is passed along; nothing about parallelism is kept in module state.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import product

import torch
import torch.distributed as dist

from megapar.config.layout import AXES, RANK_ORDER, Layout
from megapar.trace.clock import Timeline

DEFAULT_TIMEOUT_S = 300.0  # of waits that are not torch's


@dataclass(frozen=True)
class Axis:
    """One axis as seen from one rank: its peers along it and how to reach them."""

    name: str
    size: int
    index: int
    ranks: tuple[int, ...]
    group: dist.ProcessGroup | None
    timeline: Timeline

    def blocked(self, operation: str) -> AbstractContextManager[None]:
        """Time an operation over this axis that computation waits for."""
        return self.timeline.span(self.name, operation, f" over {self.name} of ranks {', '.join(map(str, self.ranks))}")


@dataclass
class Mesh:
    """A grid of ranks with one process group per axis and set of axes asked for.

    Building a mesh of more than one rank needs an initialised default process group of exactly `layout.world` ranks and
    is collective: every rank asks for the same axes in the same order.
    timeout: after which an operation over any of its groups fails; torch would give a new group half an hour.
    groups: without them nothing can be communicated, and the mesh only says who is where.

    `mesh["tp"]` is an axis; `mesh["world"]` all ranks. Joint axes by what they mean for numbers:
    samples: ranks along it take different samples; data: along it gradients are partial sums (samples and tokens);
    distinct: everything but axes along which ranks repeat each other.
    """

    layout: Layout = field(default_factory=Layout)
    rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    timeout: timedelta | None = None
    groups: bool = True

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world_size
        self.timeline = Timeline(self.device)
        self.place = self.layout.coordinates(self.rank)
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        self._axes = {name: self._join(name, (name,)) for name in RANK_ORDER}
        self._axes["world"] = self._join("world", RANK_ORDER)
        # A second group along pp: on NCCL transfers in opposite directions over one communicator wait for each other.
        self._axes["pp_backward"] = self._join("pp", ("pp",), key=(-1,))
        self.samples = self._splitting("samples")
        self.data = self._splitting("samples", "tokens")
        self.distinct = self._join("world", [name for name in RANK_ORDER if AXES[name].splits])

    @property
    def timeout_s(self) -> float:
        return self.timeout.total_seconds() if self.timeout else DEFAULT_TIMEOUT_S

    @property
    def world_size(self) -> int:
        return self.layout.world

    def rank_at(self, **coordinates: int) -> int:
        """Global rank at this rank's coordinates with some of them replaced."""
        return self.layout.rank_at(self.place | coordinates)

    def first_rank(self, **coordinates: int) -> int:
        """The rank with these coordinates and 0 along every other axis: the same one for whoever asks."""
        return self.layout.rank_at(dict.fromkeys(self.layout, 0) | coordinates)

    def first_along(self, *splits: str | None) -> bool:
        """Whether this rank is the first along every axis that splits one of these."""
        return all(index == 0 for name, index in self.place.items() if AXES[name].splits in splits)

    @property
    def first_copy(self) -> bool:
        """Whether this rank is the first of those that repeat each other."""
        return self.first_along(None)

    @property
    def first_replica(self) -> bool:
        """Whether this rank is the first of those that hold the same part of the model."""
        return self.first_along(None, "samples", "tokens")

    def __getitem__(self, name: str) -> Axis:
        return self._axes[name]

    def part_of(self, name: str, size: int) -> Axis:
        """The block of `size` neighbours along an axis that this rank belongs to (replicas of a kv head)."""
        whole, key = self._axes[name], f"{name}/{size}"
        if size == whole.size:
            return whole
        if key not in self._axes:
            assert whole.size % size == 0
            first = whole.index // size * size
            self._axes[key] = self._axis(name, whole.ranks[first : first + size])
        return self._axes[key]

    def among(self, indices: Iterable[int]) -> Axis:
        """The pipeline ranks with these indices, at this rank's other coordinates; any other rank is alone.

        Collective where the group is not there yet: a rank that is alone makes one too, see `_axis`.
        """
        chosen = tuple(sorted(set(indices)))
        key = f"pp{list(chosen)}"
        if key not in self._axes:
            ranks = [self.rank_at(pp=index) for index in chosen]
            self._axes[key] = self._axis("pp", ranks if self.rank in ranks else [self.rank], alone=chosen)
        return self._axes[key]

    def close(self) -> None:
        """Destroy the groups. The default group belongs to whoever made it."""
        for group in self._groups.values():
            if group is not dist.group.WORLD:
                dist.destroy_process_group(group)
        self._groups.clear()
        self._axes.clear()

    def _splitting(self, *what: str) -> Axis:
        """The joint axis of all that split this among ranks."""
        names = [name for name in RANK_ORDER if AXES[name].splits in what]
        return self._join(names[0], names)

    def _join(self, name: str, along: Sequence[str], key: tuple[int, ...] = ()) -> Axis:
        ranges = [range(self.layout[axis]) for axis in along]
        ranks = [self.rank_at(**dict(zip(along, place, strict=True))) for place in product(*ranges)]
        return self._axis(name, ranks, key)

    def _axis(self, name: str, ranks: Sequence[int], key: tuple[int, ...] = (), *, alone: tuple[int, ...] = ()) -> Axis:
        """The axis with a group of its own, or one that has these very ranks and the same `key` already.

        Only members take part in making a group. torch names such a group by its ranks and by how many groups this
        process has, so every rank must make as many as its peers: one that is alone while others make a group of the
        pipeline ranks `alone` makes one too.
        """
        group = None
        if self.groups and (len(ranks) > 1 or len(alone) > 1):
            place = (*key, *ranks) if len(ranks) > 1 else (-2, *alone, *ranks)
            if place not in self._groups:
                whole = len(ranks) == self.world_size and not key
                made = dist.group.WORLD
                if not whole:
                    made = dist.new_group(list(ranks), timeout=self.timeout, use_local_synchronization=True)
                assert made is not None, "initialise the default process group first"
                self._groups[place] = made
            group = self._groups[place]
        return Axis(name, len(ranks), ranks.index(self.rank), tuple(ranks), group, self.timeline)
