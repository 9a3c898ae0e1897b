"""The tables of a benchmark, as text for a terminal and as Markdown. They are made from its rows alone."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from megapar.bench.roofline import GPUS, gpu_named
from megapar.bench.rows import Row
from megapar.kernels.shapes import MODELS

WRITTEN = "Least time by roofline; m: bound by memory, c: by compute. Peaks of the makers' data sheets."
LEGEND = [
    "time: median ms, and what 20% and 80% of the samples stay below. rate: of useful FLOPs or of least bytes.",
    "MB: most that one call holds on top of what was there.",
    WRITTEN,
]
INTERPRETED = "Triton's interpreter ran these kernels. The times are the interpreter's, and say nothing of a GPU's."
STATIC = [
    "Our kernels: what their machine code shows. No GPU is here, so none of them was timed.",
    "bound: share of the tensor cores' peak that the main loop could reach; lockstep: with the overlap that it has.",
]


@dataclass(frozen=True)
class Table:
    """A title, cells with the header first, and what to know about them."""

    title: str
    cells: list[list[str]]
    notes: list[str]

    def text(self) -> str:
        widths = [max(len(row[column]) for row in self.cells) for column in range(len(self.cells[0]))]
        lines = ["  ".join(_align(cell, width) for cell, width in zip(row, widths, strict=True)) for row in self.cells]
        return "\n".join([self.title, *(line.rstrip() for line in lines), *self.notes])

    def markdown(self) -> str:
        header, *body = ["| " + " | ".join(row) + " |" for row in self.cells]
        rule = "|" + "|".join("---:" if _number(cell) else "---" for cell in self.cells[-1]) + "|"
        notes = ["", *self.notes] if self.notes else []
        return "\n".join([f"## {self.title}", "", header, rule, *body, *notes])


def _number(cell: str) -> bool:
    return cell[:1].isdigit()


def _align(cell: str, width: int) -> str:
    return cell.rjust(width) if _number(cell) else cell.ljust(width)


def timings(rows: Iterable[Row]) -> list[Table]:
    """A table for each kernel and shape that was timed: of a kind, never two kinds in one."""
    timed = [row for row in rows if row.metric == "time"]
    tables = []
    for kernel, shape, dtype, kind in dict.fromkeys((r.kernel, r.shape, r.dtype, r.kind) for r in timed):
        mine = [r for r in rows if (r.kernel, r.shape, r.dtype, r.kind) == (kernel, shape, dtype, kind)]
        shown = {(r.x, r.mode, r.provider, r.metric): r for r in mine}
        floor = _floors([r for r in rows if (r.kernel, r.shape, r.dtype) == (kernel, shape, dtype)])
        times = sorted((r for r in mine if r.metric == "time"), key=lambda r: r.x or 0)
        rate = "tflops" if any(r.metric == "tflops" for r in mine) else "gbps"
        gpu = gpu_named(times[0].device)
        header = ["tokens", "mode", "provider", "ms", "20%", "80%"]
        if kind == "measured":
            header += ["TFLOP/s" if rate == "tflops" else "GB/s", "MB"]
        header += [gpu.name for gpu in GPUS] + (["of least"] if gpu else [])
        cells = [header]
        for row in sorted(times, key=lambda r: (r.x or 0, list(MODES_SHOWN).index(r.mode))):
            name = f"{row.provider}: {row.note}" if row.note else row.provider
            line = [str(row.x), row.mode, name, *(number(v or 0.0) for v in (row.p50, row.p20, row.p80))]
            if kind == "measured":
                line += [number(shown[row.x, row.mode, row.provider, m].p50) for m in (rate, "memory")]
            line += [_least(floor[row.x, row.mode, each.name]) for each in GPUS]
            if gpu:
                line.append(f"{floor[row.x, row.mode, gpu.name].p50 / row.p50:.0%}")
            cells.append(line)
        title = f"{kernel}, {shape}, {dtype}: {kind} on {times[0].device}"
        tables.append(Table(title, cells, [INTERPRETED] if kind == "interpreted" else []))
    return tables


MODES_SHOWN = ("forward", "backward", "full")


def _floors(rows: Iterable[Row]) -> dict[tuple[int | None, str, str], Row]:
    return {(row.x, row.mode, row.device): row for row in rows if row.metric == "least_time"}


def _least(row: Row) -> str:
    return f"{number(row.p50, 2)} {row.note[0]}"


def rooflines(rows: Iterable[Row]) -> list[Table]:
    """What every kernel must do at least, and the least ms of that on each GPU."""
    tables = []
    computed = [row for row in rows if row.provider == "roofline"]
    for kernel, shape, dtype in dict.fromkeys((r.kernel, r.shape, r.dtype) for r in computed):
        mine = [r for r in computed if (r.kernel, r.shape, r.dtype) == (kernel, shape, dtype)]
        amounts = {(r.x, r.mode, r.metric): r.p50 for r in mine if not r.device}
        floor = _floors(mine)
        cells = [["tokens", "mode", "GFLOP", "MB", "FLOP/B", *(gpu.name for gpu in GPUS)]]
        for x, mode in dict.fromkeys((r.x, r.mode) for r in mine):
            flops, moved = amounts[x, mode, "flops"], amounts[x, mode, "bytes"]
            line = [str(x), mode, number(flops / 1e9), number(moved / 1e6), number(amounts[x, mode, "intensity"])]
            cells.append([*line, *(_least(floor[x, mode, gpu.name]) for gpu in GPUS)])
        tables.append(Table(f"{kernel}, {shape}, {dtype}: least ms by roofline", cells, []))
    return tables


def machine_code(rows: Iterable[Row]) -> list[Table]:
    """Figures of our kernels, one table."""
    read = [row for row in rows if row.kind == "static" and row.provider == "megapar"]
    if not read:
        return []
    figures = {(r.kernel, r.shape, r.device, r.mode, r.note, r.metric): r.p50 for r in read}
    cells = [["kernel", "shape", "target", "mode", "launch", "registers", "spill B", "shared KB", "bound", "lockstep"]]
    for key in dict.fromkeys(name[:-1] for name in figures):
        kernel, shape, target, mode, launch = key
        shared = figures[*key, "shared_memory"] / 1024
        shares = [f"{figures[*key, m]:.2f}" if (*key, m) in figures else "" for m in ("bound", "lockstep")]
        counts = [f"{figures[*key, m]:.0f}" for m in ("registers", "spill")]
        name = launch.removesuffix("_kernel").removeprefix(f"{kernel}_")
        cells.append([kernel, shape, target, mode, name, *counts, f"{shared:.0f}", *shares])
    return [Table("machine code", cells, STATIC)]


def terminal(rows: list[Row]) -> str:
    """What was timed beside the roofline; where nothing was, the roofline alone; and the machine code."""
    timed = timings(rows)
    first = timed or rooflines(rows)
    notes = [*(LEGEND if timed else [WRITTEN]), *shapes(rows)]
    return "\n\n".join([*(table.text() for table in [*first, *machine_code(rows)]), "\n".join(notes)])


def markdown(rows: list[Row]) -> str:
    """Everything."""
    versions = " ".join(dict.fromkeys(word for row in rows for word in _pairs(row.versions)))
    tables = [*timings(rows), *machine_code(rows), *rooflines(rows)]
    head = ["# Kernels", "", *(f"- {line}" for line in [*LEGEND, *shapes(rows), f"versions: {versions}"])]
    return "\n".join(head) + "\n\n" + "\n\n".join(table.markdown() for table in tables) + "\n"


def shapes(rows: Iterable[Row]) -> list[str]:
    return [MODELS[name].describe(name) for name in dict.fromkeys(row.shape for row in rows)]


def _pairs(versions: str) -> list[str]:
    words = versions.split()
    return [f"{name} {version}" for name, version in zip(words[::2], words[1::2], strict=True)]


def number(value: float, digits: int = 3) -> str:
    """So many significant digits, without an exponent."""
    decimals = digits - 1 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{max(0, decimals)}f}"
