"""The axes of parallelism, declared once, and layouts such as `tp2pp2dp2`.

The keys of `parallel`, the names of layouts, the order of ranks, the mesh's groups, reports and metrics follow from
`AXES` and `RANK_ORDER`. docs/howto/add-an-axis.md adds one.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isqrt, prod
from typing import Literal

from megapar.config.errors import ConfigError


@dataclass(frozen=True)
class AxisKind:
    """One way to share the work of a step among ranks.

    name: its letters in a layout's name, and its key in `parallel`
    splits: what ranks along it divide among themselves. Over axes that split samples or tokens gradients are partial
        sums. None: they all do the same.
    derived: without a number of its own it takes the ranks that the other axes leave
    also: what other programs call its key
    """

    name: str
    help: str
    splits: Literal["weights", "layers", "samples", "tokens"] | None
    derived: bool = False
    also: tuple[str, ...] = ()


AXES: dict[str, AxisKind] = {
    kind.name: kind
    for kind in (  # in the order of a layout's name
        AxisKind(
            "tp",
            "tensor-parallel ranks: matrices are split over them",
            "weights",
            also=("tensor_parallel", "tensor_model_parallel_size", "tensor_parallel_size"),
        ),
        AxisKind(
            "pp",
            "pipeline ranks: layers are split over them",
            "layers",
            also=("pipeline_parallel", "pipeline_model_parallel_size", "pipeline_parallel_size"),
        ),
        AxisKind(
            "dp",
            "data-parallel ranks; default: all visible GPUs / (tp*pp), 1 on a CPU",
            "samples",
            derived=True,
            also=("data_parallel", "data_parallel_size"),
        ),
    )
}

# Outermost first: rank = (pp * dp_ranks + dp) * tp_ranks + tp. Tensor-parallel peers talk most and are neighbours.
RANK_ORDER = ("pp", "dp", "tp")

# Along these ranks meet inside a pass through a stage; along the others between two passes.
INSIDE_STAGES = tuple(name for name in RANK_ORDER if AXES[name].splits != "layers")


@dataclass(frozen=True, init=False)
class Layout(Mapping[str, int]):
    """Ranks along each axis, by its name: `Layout(tp=2, dp=4)`; what is left out is 1.

    `str(layout)` leaves out axes of one rank: `tp2dp4`; one rank in all is `single`.
    """

    sizes: tuple[int, ...]  # in the order of AXES

    def __init__(self, **sizes: int) -> None:
        assert sizes.keys() <= AXES.keys(), f"axes are {', '.join(AXES)}"
        object.__setattr__(self, "sizes", tuple(sizes.get(name, 1) for name in AXES))

    def __getitem__(self, name: str) -> int:
        return dict(zip(AXES, self.sizes, strict=True))[name]

    def __iter__(self) -> Iterator[str]:
        return iter(AXES)

    def __len__(self) -> int:
        return len(AXES)

    @property
    def world(self) -> int:
        """Ranks in all."""
        return prod(self.sizes)

    def over(self, splits: str) -> int:
        """Ranks that divide `splits` among themselves."""
        return prod(self[name] for name, kind in AXES.items() if kind.splits == splits)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Index along every axis of a rank, in RANK_ORDER."""
        found = {}
        for name in reversed(RANK_ORDER):
            rank, found[name] = divmod(rank, self[name])
        return {name: found[name] for name in RANK_ORDER}

    def rank_at(self, coordinates: Mapping[str, int]) -> int:
        """The rank with this index along every axis: the inverse of `coordinates`."""
        rank = 0
        for name in RANK_ORDER:
            rank = rank * self[name] + coordinates[name]
        return rank

    def replica(self, coordinates: Mapping[str, int]) -> int:
        """Which copy of the model the rank with these coordinates is part of."""
        number = 0
        for name in RANK_ORDER:
            if AXES[name].splits not in ("layers", "weights"):
                number = number * self[name] + coordinates[name]
        return number

    @property
    def replicas(self) -> int:
        """Copies of the model."""
        return prod(self[name] for name, kind in AXES.items() if kind.splits not in ("layers", "weights"))

    def __str__(self) -> str:
        return "".join(f"{name}{size}" for name, size in self.items() if size > 1) or "single"

    @classmethod
    def parse(cls, name: str, key: str = "layouts") -> "Layout":
        """Layout named by axes in any order, a missing one being 1. Raises ConfigError for `key` on anything else."""
        if name == "single":
            return cls()
        parts = re.findall(rf"({'|'.join(AXES)})([1-9][0-9]*)", name)
        axes = [axis for axis, _ in parts]
        if not parts or "".join(a + n for a, n in parts) != name or len(set(axes)) != len(axes):
            *others, last = AXES
            letters = f"{', '.join(others)} and {last}"
            raise ConfigError(key, name, f"not a layout; write {letters} with their ranks, such as tp2pp2dp2 or dp4")
        return cls(**{axis: int(size) for axis, size in parts})


def layouts_up_to(ranks: int) -> list[Layout]:
    """Every layout of 2 to `ranks` ranks, fewest ranks first, over the axes that split something."""
    found = [layout for world in range(2, ranks + 1) for layout in layouts_of(world)]
    return sorted(found, key=lambda layout: (layout.world, layout.sizes))


def layouts_of(ranks: int) -> list[Layout]:
    """Every layout of so many ranks over the axes that split something, by its factors."""
    names = [name for name, kind in AXES.items() if kind.splits is not None]
    return [Layout(**dict(zip(names, sizes, strict=True))) for sizes in _products(ranks, len(names))]


def _products(number: int, count: int) -> list[tuple[int, ...]]:
    """Every way to write a number as a product of so many."""
    if count == 1:
        return [(number,)]
    small = [factor for factor in range(1, isqrt(number) + 1) if number % factor == 0]
    factors = {*small, *(number // factor for factor in small)}
    return [(first, *rest) for first in factors for rest in _products(number // first, count - 1)]
