"""Schedules by name: the generators that there are, and `csv:PATH`."""

import difflib
import importlib
import pkgutil
from functools import cache

from megapar.schedule import generators as package
from megapar.schedule.actions import Rows, Schedule, ScheduleError
from megapar.schedule.compute import check_rows
from megapar.schedule.costs import Costs
from megapar.schedule.generator import Generator, Problem
from megapar.schedule.lower import lower
from megapar.schedule.table import read, rows_of, rows_text

CSV = "csv:"
_searched: dict[str, str] = {}  # tables by what they were searched for


@cache
def generators() -> dict[str, Generator]:
    """Every schedule by name: those of the modules in `generators/`. Raises ScheduleError for one without."""
    names = [found.name for found in pkgutil.iter_modules(package.__path__)]
    declared = [_declared(name) for name in names]
    return {generator.name: generator for generator in sorted(declared, key=lambda generator: generator.name)}


def _declared(name: str) -> Generator:
    file = f"{package.__name__.replace('.', '/')}/{name}.py"
    try:
        module = importlib.import_module(f"{package.__name__}.{name}")
    except Exception as error:  # whatever a file of the user's own may raise
        line = (str(error).splitlines() or [""])[0]
        raise ScheduleError(f"{file}: can't be used as a schedule ({type(error).__name__}: {line})") from error
    if not isinstance(found := getattr(module, "SCHEDULE", None), Generator):
        raise ScheduleError(f"{file}: declares no schedule; write SCHEDULE = Generator(...)")
    return found


def refuse_unknown(name: str) -> None:
    """Raise ScheduleError for a name that is no schedule's, with the nearest that is one."""
    known = generators()
    if name in known or (name.startswith(CSV) and name != CSV):
        return
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ScheduleError(f"no such schedule; {hint}there are {', '.join(known)} and {CSV}PATH")


def table_ranks(name: str) -> int | None:
    """The ranks that a `csv:PATH` is for; None for a schedule that takes any. Raises ScheduleError."""
    return len(read(name.removeprefix(CSV)).rows) if name.startswith(CSV) else None


def default_chunks(name: str) -> int:
    """Stages per rank of a schedule where nothing else is asked for. Raises ScheduleError."""
    refuse_unknown(name)
    if not name.startswith(CSV):
        return generators()[name].chunks.start
    table = read(name.removeprefix(CSV))
    return -(-table.stages // len(table.rows))


def refuse_chunks(name: str, chunks: int) -> str | None:
    """Why a schedule does not take this many stages per rank; None if it does. A table's are checked by `refusal`."""
    if name.startswith(CSV) or chunks in (takes := generators()[name].chunks):
        return None
    number = "one stage" if len(takes) == 1 and takes.start == 1 else f"{takes.start} stages"
    return f"the {name} schedule has {number}{' or more' if len(takes) > 1 else ''} per rank; use {takes.start}"


def refusal(name: str, ranks: int, microbatches: int, chunks: int) -> str | None:
    """Why a schedule can't be built for these ranks, micro-batches and stages per rank; None if it can.

    Raises ScheduleError for a table that can't be read.
    """
    for what, number in (("ranks", ranks), ("micro-batches", microbatches), ("stages per rank", chunks)):
        if number < 1:
            return f"{number} {what}; at least 1"
    if name.startswith(CSV):
        table = read(name.removeprefix(CSV))
        if len(table.rows) != ranks:
            return f"the table has {len(table.rows)} rows, and there are {ranks} ranks"
        if table.microbatches != microbatches:
            return f"the table has {table.microbatches} micro-batches, and there are {microbatches}"
        if table.stages != ranks * chunks:
            return f"the table has {table.stages} stages, and {ranks} ranks of {chunks} have {ranks * chunks}"
        return None
    return refuse_chunks(name, chunks) or generators()[name].refuse(ranks, microbatches, chunks)


def searched() -> dict[str, str]:
    """What this process has found by a search, for `hand_over` in another one."""
    return dict(_searched)


def hand_over(found: dict[str, str]) -> None:
    """Have `build` take what another process has searched for."""
    _searched.update(found)


def _rows(generator: Generator, problem: Problem) -> Rows:
    if not generator.searches:
        return generator.build(problem)
    key = f"{generator.name} {problem}"
    if key not in _searched:
        _searched[key] = rows_text(generator.build(problem))
    return rows_of(_searched[key])


def build(
    name: str,
    ranks: int,
    microbatches: int,
    *,
    chunks: int | None = None,
    costs: Costs | None = None,
    memory_limit: float = float("inf"),
) -> Schedule:
    """The named schedule with its transfers, not yet checked.

    chunks: stages per rank; default: the schedule's own. costs: by stage, default F = I = W; few schedules look at
    them. memory_limit: see `Problem`. Raises ScheduleError where there is no such schedule.
    """
    chunks = default_chunks(name) if chunks is None else chunks
    if why := refusal(name, ranks, microbatches, chunks):
        raise ScheduleError(f"{name}: {why}")
    stages = ranks * chunks
    if name.startswith(CSV):
        rows = read(name.removeprefix(CSV)).rows
        check_rows(rows, stages, microbatches)
    else:
        costs = Costs.even(ranks, stages) if costs is None else costs.normalised(ranks)
        rows = _rows(generators()[name], Problem(ranks, microbatches, chunks, costs, memory_limit))
    return lower(rows, stages, microbatches)
