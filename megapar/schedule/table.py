"""The compute-only table of a schedule as CSV: a row per rank, a cell per action, `2F0,2I0,,2W0`.

It is the form that torch.distributed.pipelining writes and loads as "compute_only": global stage, kind (F, B, I, W),
micro-batch; an empty cell is a slot in which the rank idles. Its `(0F5;1B3)OVERLAP_F_B` cells are read as their parts.
"""

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megapar.schedule.actions import COMPUTE, Action, Row, Rows, Schedule, ScheduleError

_OVERLAPPED = re.compile(r"\(([^()]*)\)OVERLAP_F_B")


@dataclass(frozen=True)
class Table:
    """Compute actions as they were read, with the sizes that they show."""

    rows: Rows
    stages: int
    microbatches: int


def write(schedule: Schedule, path: str) -> None:
    """Write the compute actions of a schedule."""
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        file.write(as_text(schedule))


def as_text(schedule: Schedule) -> str:
    """The table of a schedule's compute actions."""
    return rows_text([[action for action in row if action.kind in COMPUTE] for row in schedule.rows])


def rows_text(rows: Rows) -> str:
    """The table of compute actions."""
    file = io.StringIO(newline="")
    csv.writer(file).writerows(rows)
    return file.getvalue()


def rows_of(text: str) -> Rows:
    """The compute actions of a table that `rows_text` made."""
    return [[Action.parse(cell) for cell in row] for row in csv.reader(io.StringIO(text, newline=""))]


def refuse_special(path: Path, what: str) -> None:
    """Raise ScheduleError for a FIFO or device, of which a reader may wait for ever."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ScheduleError(f"{path}: is a FIFO or a device; write the {what} to a file")


def read(path: str) -> Table:
    """Read a table. Raises ScheduleError, one line with row and cell, for what is none; `check_rows` says the rest."""
    there = Path(path).expanduser()
    refuse_special(there, "table")
    try:
        with there.open(newline="", encoding="utf-8-sig") as file:
            cells = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ScheduleError(f"{path}: not readable as a table: {getattr(error, 'strerror', None) or error}") from None
    while cells and not any(cells[-1]):  # blank lines at the end
        cells.pop()
    rows = [_row(path, rank, row) for rank, row in enumerate(cells)]
    actions = [action for row in rows for action in row]
    if not actions:
        raise ScheduleError(f"{path}: no actions; a row per rank, cells such as 2F0")
    return Table(rows, 1 + max(action.stage for action in actions), 1 + max(action.microbatch for action in actions))


def _row(path: str, rank: int, cells: Sequence[str]) -> Row:
    row: Row = []
    for at, cell in enumerate(cells):
        pair = _OVERLAPPED.fullmatch(cell.strip())
        for text in pair[1].split(";") if pair else [cell]:
            if not text.strip():
                continue
            try:
                action = Action.parse(text)
            except ScheduleError as error:
                raise ScheduleError(f"{path}, row {rank}, cell {at}: {error}") from None
            if action.kind not in COMPUTE:
                problem = f"{action} is no computation; leave transfers and reductions out, they are added"
                raise ScheduleError(f"{path}, row {rank}, cell {at}: {problem}")
            row.append(action)
    return row
