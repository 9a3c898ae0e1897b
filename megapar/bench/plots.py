"""Pictures of what was measured: a file for each kernel and metric. What was interpreted or computed is not drawn."""

from collections.abc import Iterable, Sequence

from megapar.bench.problem import MODES
from megapar.bench.roofline import gpu_named
from megapar.bench.rows import Row
from megapar.report.curves import Curve, Panel, draw_curves
from megapar.report.svg import COLOURS, MUTED

COLOUR = {
    "megapar": COLOURS["F"],
    "torch": COLOURS["B"],
    "flash_attn": COLOURS["I"],
    "liger_kernel": COLOURS["W"],
}
TITLES = {
    "time": "time of one call",
    "tflops": "useful arithmetic",
    "gbps": "least bytes by time",
    "memory": "most memory that one call holds",
}


def names(kernels: Iterable[str]) -> list[str]:
    """Of all files that `plots` may draw."""
    return [f"{kernel}_{metric}.svg" for kernel in kernels for metric in TITLES]


def plots(rows: Sequence[Row]) -> dict[str, str]:
    """File name -> SVG. A row of panels for each shape, a panel for each mode, a line for each provider."""
    pictures = {}
    measured = [row for row in rows if row.kind == "measured" and row.p50 > 0]
    products = {row.kernel for row in measured if row.metric == "tflops"}  # whose bytes are not what counts
    measured = [row for row in measured if row.metric != "gbps" or row.kernel not in products]
    for kernel, metric in dict.fromkeys((row.kernel, row.metric) for row in measured):
        mine = [row for row in measured if (row.kernel, row.metric) == (kernel, metric)]
        modes = [mode for mode in MODES if any(row.mode == mode for row in mine)]
        grid = []
        for shape, dtype in dict.fromkeys((row.shape, row.dtype) for row in mine):
            panels = []
            for mode in modes:
                there = [row for row in mine if (row.shape, row.dtype, row.mode) == (shape, dtype, mode)]
                floor = _floor(rows, there[0]) if metric == "time" and there else []
                panels.append(Panel(f"{mode}, {shape}, {dtype}", [*_curves(there), *floor]))
            grid.append(panels)
        title = f"{kernel}: {TITLES[metric]}, measured on {mine[0].device}"
        pictures[f"{kernel}_{metric}.svg"] = draw_curves(title, _unit(mine[0]), "tokens", grid)
    return pictures


def _unit(row: Row) -> str:
    return f"{row.unit}, {'median, and the band from 20% to 80% of the samples' if row.p20 else 'one call'}"


def _curves(rows: Sequence[Row]) -> list[Curve]:
    curves = []
    for provider in dict.fromkeys(row.provider for row in rows):
        mine = sorted((row for row in rows if row.provider == provider), key=lambda row: row.x or 0)
        points = [(row.x or 1, row.p50, row.p20 or row.p50, row.p80 or row.p50) for row in mine]
        curves.append(Curve(provider, COLOUR[provider], points))
    return curves


def _floor(rows: Sequence[Row], like: Row) -> list[Curve]:
    """The least time on the GPU that measured, where its peaks are known."""
    gpu = gpu_named(like.device)
    if gpu is None:
        return []
    place = (like.kernel, like.shape, like.dtype, like.mode, "least_time", gpu.name)
    found = [r for r in rows if (r.kernel, r.shape, r.dtype, r.mode, r.metric, r.device) == place]
    points = [(row.x or 1, row.p50, row.p50, row.p50) for row in found]
    return [Curve(f"{gpu.name} at its peaks", MUTED, points, dashed=True)]
