"""What a command is, and which there are: those of the modules in `commands/` that declare a COMMAND, or COMMANDS.

`megapar --help` imports all of these modules and is to answer at once: what is heavy (torch, numpy, yaml, launching)
they import where they use it.
"""

import importlib
import pkgutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

from megapar.cli import commands as package

if TYPE_CHECKING:
    from megapar.cli.compose import Overrides
    from megapar.launch.rank import Job

UNPLACED = 100


@dataclass(frozen=True)
class Call:
    """How a command was called, besides its configuration."""

    overrides: list[str]  # as they could be typed again
    entry: str | None = None  # "module:function" to call in each rank instead of the command's own
    start: float = field(default_factory=time.monotonic)  # when, by the monotonic clock
    copies: Sequence[dict[str, Any]] = ()  # what hosts have of the run in memory, see `megapar.launch.copies.held`


class Plan(Protocol):
    """Makes the job for the ranks of a command from its composed configuration; None: there is nothing to do. Raises
    UserError.

    claims: holds the run directory until it is closed; None: the caller holds it already
    world_size: ranks that something else has started; None: none runs yet
    """

    def __call__(
        self, config: Any, call: Call, claims: ExitStack | None, *, world_size: int | None = None
    ) -> "Job | None": ...


@dataclass(frozen=True)
class Command:
    """A command of the command line.

    name: one word, or two: `megapar bench kernels`
    config: the dataclass of its keys. What differs from their defaults, and its groups, may stand in `conf/NAME.yaml`
    run: does it with the composed configuration, and returns the exit code. May raise UserError (exit code 2) and
        RankFailure (1)
    about, examples (line, what it does), most_used (keys): what `--help` says of it
    order: place in `megapar --help`; equal ones by name
    positional: the key that a first word without `=` stands for, such as `run.dir`, or the keys of several such words.
        They must be verbatim ones
    own: keys that have the value they would have without `experiment=`, whatever the experiment says
    plan: for a command whose ranks torchrun or srun may have started
    sweep: what `-m` does: runs every combination of the overrides, and returns the exit code
    """

    name: str
    config: type
    run: Callable[[Any, Call], int]
    about: str
    examples: Sequence[tuple[str, str]] = ()
    most_used: Sequence[str] = ()
    order: int = UNPLACED
    positional: str | tuple[str, ...] | None = None
    own: Sequence[str] = ()
    plan: Plan | None = None
    sweep: "Callable[[Overrides, str | None], int] | None" = None

    @property
    def positionals(self) -> dict[str, str]:
        """The positional keys, each with what help calls its word: RUN for `run.dir`."""
        keys = (self.positional,) if isinstance(self.positional, str) else self.positional or ()
        return {key: key.partition(".")[0].upper() for key in keys}


@cache
def commands() -> dict[str, Command]:
    """Every command by name, in the order of `megapar --help`."""
    modules = (
        importlib.import_module(f"{package.__name__}.{found.name}") for found in pkgutil.iter_modules(package.__path__)
    )
    declared = [
        command
        for module in modules
        for command in getattr(module, "COMMANDS", [module.COMMAND] if hasattr(module, "COMMAND") else [])
    ]
    return {command.name: command for command in sorted(declared, key=lambda command: (command.order, command.name))}
