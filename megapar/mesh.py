"""Who sits where: the ranks of a run as a grid with the axes of `megapar.config.layout`.

A `Mesh` is an object that is passed along; nothing about parallelism is kept in module state.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from itertools import product

import torch
import torch.distributed as dist

from megapar.config.layout import AXES, INSIDE_STAGES, RANK_ORDER, Layout
from megapar.trace.announcements import described
from megapar.trace.clock import Timeline

DEFAULT_TIMEOUT_S = 300.0  # of waits that are not torch's

# What a pipeline sends: (forward or backward, whether to a higher pipeline rank). Each has a group of its own: NCCL
# runs the transfers of two ranks over one group one after another, and a receive posted ahead would hold up the sends
# behind it. 1F1B needs the first two; a schedule that goes round or back needs the others too.
CHANNELS = (("F", True), ("B", False), ("F", False), ("B", True))


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Axis:
    """One axis as seen from one rank: its peers along it and how to reach them."""

    name: str
    size: int
    index: int
    ranks: tuple[int, ...]
    group: dist.ProcessGroup | None
    timeline: Timeline

    def blocked(self, operation: str, *operands: torch.Tensor) -> AbstractContextManager[None]:
        """Time an operation over this axis that computation waits for. operands: what ranks compare, if they do."""
        span = self.timeline.span(self.name, operation, f" over {self.over}", waiting=True)
        return self._compared(operation, operands, span) if operands and self.timeline.announcements else span

    @property
    def over(self) -> str:
        return f"{self.name} of ranks {', '.join(map(str, self.ranks))}"

    @contextmanager
    def _compared(
        self, operation: str, operands: Sequence[torch.Tensor], span: AbstractContextManager[None]
    ) -> Iterator[None]:
        compare = self.announce(operation, *operands)
        with span:
            yield
        compare()

    def announce(self, operation: str, *operands: torch.Tensor) -> Callable[[], None]:
        """Announce an operation of all ranks of the axis. Returns what compares it with theirs when it is over."""
        announcements = self.timeline.announcements
        if announcements is None:
            return _nothing
        what = described(operation, *operands)
        number = announcements.announce(self.over, what)
        return partial(announcements.compare, self.over, number, what, self.ranks)


@dataclass
class Mesh:
    """A grid of ranks with one process group per axis and set of axes asked for.

    Building a mesh of more than one rank needs an initialised default process group of exactly `layout.world` ranks and
    is collective: every rank asks for the same axes in the same order. On NCCL a group of an axis is used once when it
    is made, so that no first use waits in the middle of a step; the pairs of a pipeline follow in `connect`.
    timeout: after which an operation over any of its groups fails; torch would give a new group half an hour.
    groups: without them nothing can be communicated, and the mesh only says who is where.

    `mesh["tp"]` is an axis; `mesh["world"]` all ranks; `mesh.hosts` a group of all for what is in the host's memory.
    Joint axes by what they mean for numbers:
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
        self._groups: dict[tuple[str, tuple[int, ...]], dist.ProcessGroup] = {}
        self._connected: set[tuple[str, int, int]] = set()
        self._axes = {name: self._join(name, (name,)) for name in RANK_ORDER}
        self._axes["world"] = self._join("world", RANK_ORDER)
        for kind, up in CHANNELS[1:]:
            self._axes[_channel(kind, up)] = self._join("pp", ("pp",), purpose=_channel(kind, up))
        self.hosts = self._axes["world"].group
        if self.hosts is not None and _connects_late(self.device):
            self.hosts = dist.new_group(backend="gloo", timeout=self.timeout)
            self._groups["hosts", tuple(range(self.world_size))] = self.hosts
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

    @property
    def stage(self) -> Axis:
        """All ranks that hold parts of this rank's stages. Collective at its first use, as `among` is."""
        if "stage" not in self._axes:
            along = [name for name in INSIDE_STAGES if self.layout[name] > 1]
            self._axes["stage"] = self._join(along[0] if len(along) == 1 else "world", INSIDE_STAGES)
        return self._axes["stage"]

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

    def channel(self, kind: str, source: int, target: int) -> Axis:
        """The axis over which pipeline rank `source` sends to `target` in a forward (F) or backward (B) pass."""
        return self._axes[_channel(kind, source < target)]

    def connect(self, transfers: Iterable[tuple[str, int, int]]) -> None:
        """Make the first use of what these transfers (kind, source, target) of pipeline ranks go over.

        Collective over pp: every rank names all transfers of all ranks. On NCCL a first use blocks the host until the
        peer's, so two ranks that begin with different peers or channels may wait for each other forever; here all come
        in one order. Pairs that share no rank are neighbours in it, so they connect at the same time.
        """
        new, me = set(transfers) - self._connected, self.place["pp"]
        self._connected |= new
        if not new or not _connects_late(self.device):
            return
        for kind, source, target in sorted(new, key=_order_of_connecting):
            if me in (source, target):
                operation, peer = (dist.isend, target) if me == source else (dist.irecv, source)
                work = operation(self._token(), self["pp"].ranks[peer], group=self.channel(kind, source, target).group)
                assert work is not None
                work.wait()
                self._synchronize()

    def _token(self) -> torch.Tensor:
        return torch.zeros(1, device=self.device)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

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

    def _join(self, name: str, along: Sequence[str], purpose: str = "") -> Axis:
        ranges = [range(self.layout[axis]) for axis in along]
        ranks = [self.rank_at(**dict(zip(along, place, strict=True))) for place in product(*ranges)]
        return self._axis(name, ranks, purpose)

    def _axis(self, name: str, ranks: Sequence[int], purpose: str = "", *, alone: tuple[int, ...] = ()) -> Axis:
        """The axis with a group of its own, or one of these very ranks that was made for the same purpose.

        Only members take part in making a group. torch names such a group by its ranks and by how many groups this
        process has, so every rank must make as many as its peers: one that is alone while others make a group of the
        pipeline ranks `alone` makes one too.
        """
        group = None
        if self.groups and (len(ranks) > 1 or len(alone) > 1):
            place = (purpose if len(ranks) > 1 else f"alone {alone}", tuple(ranks))
            if place not in self._groups:
                whole = len(ranks) == self.world_size and not purpose
                made = dist.group.WORLD
                if not whole:
                    made = dist.new_group(list(ranks), timeout=self.timeout, use_local_synchronization=True)
                assert made is not None, "initialise the default process group first"
                self._groups[place] = made
                if (
                    len(ranks) > 1 and not purpose and _connects_late(self.device)
                ):  # a channel's pairs follow in `connect`
                    dist.all_reduce(self._token(), group=made)
                    self._synchronize()
            group = self._groups[place]
        return Axis(name, len(ranks), ranks.index(self.rank), tuple(ranks), group, self.timeline)


def _channel(kind: str, up: bool) -> str:
    """The name of a channel's axis; the first of all is the pp axis itself."""
    return "pp" if (kind, up) == CHANNELS[0] else f"pp {kind} {'up' if up else 'down'}"


def _order_of_connecting(transfer: tuple[str, int, int]) -> tuple[int, ...]:
    kind, source, target = transfer
    low, high = sorted((source, target))
    return CHANNELS.index((kind, source < target)), low % 2, low, high


def _connects_late(device: torch.device) -> bool:
    """Whether ranks connect at the first use of a group, or of a pair of ranks in it, and the host waits for that. NCCL
    does; a default group that somebody else has made may have it under another name (`cpu:gloo,cuda:nccl`)."""
    return device.type == "cuda" or dist.get_backend() == "nccl"
