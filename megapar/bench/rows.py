"""The one table that a benchmark is: a row for every figure, however it came about."""

import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

Kind = Literal["measured", "interpreted", "static"]


@dataclass(frozen=True)
class Row:
    """x: tokens, None where a figure doesn't depend on them. p20, p80: None where nothing was sampled.

    kind: measured: a clock or an allocator said so, on `device`. interpreted: Triton's interpreter ran the kernel,
    which says nothing about its speed. static: counted or computed, nothing ran.
    note: what bounds a least time, which Triton kernel's machine code a figure is of, or which of a provider's ways was
    timed.
    """

    kernel: str
    provider: str
    mode: str
    metric: str
    unit: str
    x: int | None
    p50: float
    p20: float | None
    p80: float | None
    device: str
    versions: str
    kind: Kind
    shape: str
    dtype: str
    note: str = ""


COLUMNS = tuple(field.name for field in fields(Row))


def write(rows: Iterable[Row], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: "" if value is None else value for name, value in asdict(row).items()})
