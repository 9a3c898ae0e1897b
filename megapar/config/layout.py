"""Layout names such as `tp2pp2dp2`."""

import re
from dataclasses import dataclass

from megapar.config.errors import ConfigError


@dataclass(frozen=True, order=True)
class Layout:
    """Ranks along each axis. `str(layout)` leaves out axes of one rank: `tp2dp2`; one rank in all is `single`."""

    tp: int = 1
    pp: int = 1
    dp: int = 1

    @property
    def world(self) -> int:
        """Ranks in all."""
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        return "".join(f"{axis}{size}" for axis, size in self.axes() if size > 1) or "single"

    def axes(self) -> list[tuple[str, int]]:
        """(axis, ranks) in the order of the name."""
        return [("tp", self.tp), ("pp", self.pp), ("dp", self.dp)]

    @classmethod
    def parse(cls, name: str, key: str = "layouts") -> "Layout":
        """Layout named by axes in any order, a missing one being 1. Raises ConfigError for `key` on anything else."""
        if name == "single":
            return cls()
        parts = re.findall(r"(tp|pp|dp)([1-9][0-9]*)", name)
        axes = [axis for axis, _ in parts]
        if not parts or "".join(a + n for a, n in parts) != name or len(set(axes)) != len(axes):
            raise ConfigError(key, name, "not a layout; write tp, pp and dp with their ranks, such as tp2pp2dp2 or dp4")
        return cls(**{axis: int(size) for axis, size in parts})


def layouts_up_to(ranks: int) -> list[Layout]:
    """Every layout of 2 to `ranks` ranks, fewest ranks first."""
    sizes = range(1, ranks + 1)
    all_of_them = [Layout(tp, pp, dp) for tp in sizes for pp in sizes for dp in sizes if 1 < tp * pp * dp <= ranks]
    return sorted(all_of_them, key=lambda layout: (layout.world, layout))
