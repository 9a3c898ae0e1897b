"""What a section is, and which there are: every file of `sections/` with a `SECTION`, found by itself."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from experiments.gpu.run import Run

FOLDER = Path(__file__).parent / "sections"


@dataclass(frozen=True)
class Section:
    """A part of the acceptance, run in a process of its own.

    wave: sections of a wave run side by side, and after those of the waves before; what is timed has a wave to itself
    seconds: its deadline, where the run has as many for it (`children.seconds_of_wave`); it is killed a little later
    needs: sections that have to run before, and are added to a choice of sections
    environment: variables of its process
    interpret: whether its Triton kernels are interpreted in a rehearsal, and not only compiled
    """

    name: str
    wave: int
    seconds: float
    run: Callable[[Run], None]
    needs: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    interpret: bool = True


def find() -> tuple[dict[str, tuple[str, Section]], dict[str, Exception]]:
    """({name: (file, section)} in the order in which they start, {file: why it could not be read})."""
    found, broken = {}, {}
    for one in pkgutil.iter_modules([str(FOLDER)]):
        try:
            section = read(one.name).SECTION
            found[section.name] = (one.name, section)
        except Exception as error:  # card-only: a name that moved loses one section and not all
            broken[one.name] = error
    ordered = sorted(found.items(), key=lambda item: (item[1][1].wave, -item[1][1].seconds, item[0]))
    return dict(ordered), broken


def read(file: str) -> ModuleType:
    return importlib.import_module(f"experiments.gpu.sections.{file}")
