"""`megapar bench overlap`: what of communication is hidden behind computation, on ranks of this machine.

Connections over loopback are paced, so that transfers take time and no core. Compared are a tensor-parallel MLP and a
training step with serial and with chunked collectives, gradient reduction with the backward that it runs beside, and
the transfers of a pipeline with its schedule's bubble. Medians of alternating repetitions.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any

from megapar.bench.config import BenchOverlapConfig
from megapar.bench.links import Links
from megapar.bench.overlap_jobs import (
    STEP,
    WIDE,
    Layer,
    Phase,
    Times,
    time_layer,
    time_pipeline,
    time_reduction,
    time_step,
    write_tokens,
)
from megapar.bench.rows import Row
from megapar.bench.tables import Table
from megapar.config import ConfigError
from megapar.launch.machine import cpu_model, package_version
from megapar.launch.pool import WorkerPool
from megapar.report.pieces import Walk
from megapar.schedule.build import build
from megapar.schedule.measured import measured_costs
from megapar.schedule.simulate import simulate

SUBJECTS = ("layer", "step", "dp", "pp")
TIMEOUT_S = 900.0
SLOWEST = 0.001  # Gbit/s
Log = Callable[[str], None]


@dataclass(frozen=True)
class Found:
    """Rows, and what to draw: the layer's forward by engine, at every rate."""

    rows: list[Row]
    walks: dict[float, dict[str, Walk]]


def check(config: BenchOverlapConfig) -> None:
    """Raises ConfigError."""
    if not config.subject:
        raise ConfigError("subject", config.subject, f"use {', '.join(SUBJECTS)}")
    for name in config.subject:
        if name not in SUBJECTS:
            raise ConfigError("subject", name, f"unknown; use {', '.join(SUBJECTS)}")
    for key, least in (("pairs", 1), ("ranks", 2), ("tokens", config.ranks), ("hidden", 1), ("ffn", config.ranks)):
        if getattr(config, key) < least:
            raise ConfigError(key, getattr(config, key), f"use {least} or more")
    for key in ("tokens", "ffn"):
        if getattr(config, key) % config.ranks:
            raise ConfigError(key, getattr(config, key), f"not a multiple of ranks={config.ranks}")
    if any(rate and rate < SLOWEST for rate in config.rate) or not config.rate:
        raise ConfigError("rate", config.rate, f"use Gbit/s of {SLOWEST} or more each, or 0: not paced")
    if config.pieces is not None and config.pieces < 2:
        raise ConfigError("pieces", config.pieces, "use 2 or more")
    if "layer" in config.subject and layer_of(config).engine_pieces(config.ranks) < 2:
        raise ConfigError("tokens", config.tokens, f"of {config.ranks} ranks these are one piece; use more")
    if "step" in config.subject and STEP["model.heads"] % config.ranks:
        raise ConfigError("ranks", config.ranks, f"not a divisor of the step's {STEP['model.heads']} heads")


def layer_of(config: BenchOverlapConfig) -> Layer:
    return Layer(config.tokens, config.hidden, config.ffn, config.sequence_parallel, config.pieces)


def run(config: BenchOverlapConfig, log: Log) -> Found:
    """All rows. Raises UserError where connections can't be paced here."""
    rows: list[Row] = []
    walks: dict[float, dict[str, Walk]] = {}
    with _ranks(config) as (links, pool, prefix):
        for rate in config.rate:
            links.pace(rate)
            where = f"{rate:g} Gbit/s" if rate else "not paced"
            for subject in config.subject:
                log(f"{subject}, {where}")
                if subject == "layer":
                    layer = layer_of(config)
                    found, walks[rate] = pool.run(time_layer, config.ranks, layer, config.pairs, timeout=TIMEOUT_S)[0]
                    rows += _layer_rows(found, layer, config.ranks, where)
                elif subject == "step":
                    times = pool.run(time_step, config.ranks, prefix, config.pairs, timeout=TIMEOUT_S)[0]
                    rows += step_rows(times, config.ranks, where)
                elif subject == "dp":
                    rows += _reduction_rows(pool.run(time_reduction, 2, prefix, config.pairs, timeout=TIMEOUT_S), where)
                else:
                    rows += _pipeline_rows(pool.run(time_pipeline, 2, prefix, config.pairs, timeout=TIMEOUT_S), where)
    return Found(rows, walks)


@contextmanager
def _ranks(config: BenchOverlapConfig) -> Iterator[tuple[Links, WorkerPool, str]]:
    with tempfile.TemporaryDirectory(prefix="megapar-bench-") as folder:
        links = Links(Path(folder), any(config.rate))
        with links.environment(), WorkerPool(max(2, config.ranks)) as pool:
            yield links, pool, write_tokens(Path(folder))


def _row(kernel: str, provider: str, mode: str, metric: str, unit: str, samples: list[float], **about: Any) -> Row:
    low, high = (quantiles(samples, n=5)[0], quantiles(samples, n=5)[-1]) if len(samples) > 1 else (None, None)
    versions = f"megapar {package_version('megapar')} torch {package_version('torch')}"
    return Row(
        kernel, provider, mode, metric, unit, about.pop("x", None), median(samples), low, high, cpu_model(), versions,
        "measured", about.pop("shape"), "fp32", about.pop("note"),
    )  # fmt: skip


def _layer_rows(found: dict[str, Times], layer: Layer, ranks: int, where: str) -> Iterator[Row]:
    split = ", sequence parallel" if layer.sequence_parallel else ""
    shape = f"{ranks} ranks, hidden {layer.hidden}, ffn {layer.ffn}{split}"
    about = {"x": layer.tokens, "shape": shape, "note": where}
    for mode, take in MODES.items():
        times = {name: [1e3 * take(one) for one in samples] for name, samples in found.items()}
        for name, samples in times.items():
            yield _row("tp layer", name, mode, "time", "ms", samples, **about)
        pairs = list(zip(times["serial"], times["chunked"], strict=True))
        yield _row("tp layer", "chunked", mode, "speedup", "x", [a / b for a, b in pairs], **about)
        pieces = layer.engine_pieces(ranks)
        compute, communication = median(times["compute"]), median(times["communication"])
        most = min(compute, communication) * (1 - 1 / pieces)
        hidden = (compute + communication - median(times["chunked"])) / most
        yield _row("tp layer", "chunked", mode, "hidden", f"of what {pieces} pieces can hide", [hidden], **about)


MODES: dict[str, Callable[[tuple[float, float]], float]] = {
    "forward": lambda one: one[0],
    "backward": lambda one: one[1],
    "full": lambda one: one[0] + one[1],
}


def step_rows(times: dict[str, list[tuple[float, float]]], ranks: int, where: str) -> Iterator[Row]:
    """From (seconds of a step, of them waiting for tp) by engine."""
    shape = f"{ranks} ranks, tp{ranks}, 2 layers of {WIDE['model.hidden']}"
    about = {"shape": shape, "note": where}
    for engine, samples in times.items():
        yield _row("training step", engine, "full", "time", "ms", [1e3 * one[0] for one in samples], **about)
        yield _row("training step", engine, "full", "exposed tp", "ms", [1e3 * one[1] for one in samples], **about)
    compute = [step - exposed for step, exposed in times["serial"]]
    yield _row("training step", "compute", "full", "time", "ms", [1e3 * seconds for seconds in compute], **about)
    pairs = list(zip(times["serial"], times["chunked"], strict=True))
    yield _row("training step", "chunked", "full", "speedup", "x", [a[0] / b[0] for a, b in pairs], **about)
    communication = median(exposed for _, exposed in times["serial"])
    most = min(median(compute), communication)
    hidden = (median(compute) + communication - median(step for step, _ in times["chunked"])) / most
    yield _row("training step", "chunked", "full", "hidden", "of the shorter", [hidden], **about)


def _reduction_rows(found: list[list[tuple[float, float, float]]], where: str) -> Iterator[Row]:
    """Of the rank that waited less: the other one waited for it, too."""
    about = {"shape": "2 ranks, dp2, 4 layers of 256", "note": where}
    samples = [min(ranks, key=lambda one: one[1]) for ranks in zip(*found, strict=True)]
    for index, metric in enumerate(("in flight", "waited for", "backward beside it")):
        values = [1e3 * one[index] for one in samples]
        yield _row("gradient reduction", "buckets", "backward", metric, "ms", values, **about)
    hidden = [1 - one[1] / one[0] for one in samples]
    yield _row("gradient reduction", "buckets", "backward", "hidden", "of what is in flight", hidden, **about)


def _pipeline_rows(found: list[list[Phase]], where: str) -> Iterator[Row]:
    """The bubble as it was, and as the simulator has it with the costs of the same step and transfers for nothing."""
    about = {"shape": "2 ranks, pp2, 2 layers of 256, 8 micro-batches", "note": where}
    schedule = build("1f1b", 2, 8)
    measured, simulated = [], []
    for ranks in zip(*found, strict=True):
        phase = max(one.seconds for one in ranks)
        measured.append(fmean(1 - one.busy / phase for one in ranks))
        costs = measured_costs(schedule, [action for one in ranks for action in one.actions])
        simulated.append(simulate(schedule, costs).mean_bubble)
    yield _row("pipeline", "1f1b", "full", "bubble", "of the phase", measured, **about)
    yield _row("pipeline", "simulated", "full", "bubble", "of the phase", simulated, **about)


def tables(rows: list[Row]) -> list[Table]:
    """One for each subject and link."""
    found = []
    for kernel, shape, note in dict.fromkeys((row.kernel, row.shape, row.note) for row in rows):
        mine = [row for row in rows if (row.kernel, row.shape, row.note) == (kernel, shape, note)]
        cells = [["", "", "", "median", "20%", "80%", ""]]
        cells += [
            [row.mode, row.provider, row.metric, *map(_figure, (row.p50, row.p20, row.p80)), row.unit] for row in mine
        ]
        found.append(Table(f"{kernel}: {shape}, {note}", cells, []))
    if any(row.metric == "hidden" for row in rows):
        found[-1].notes.append(HIDDEN)
    return found


HIDDEN = (
    "hidden: of the shorter of computation and communication alone, less one piece, what chunked does not take;\n"
    "over 1 where the first piece is hidden too, behind a rank's own rows or the weight gradient.\n"
    "Of a step: of the whole shorter one; what serial waits for is all communication, the rest computation.\n"
    "Of gradient reduction: what was hidden behind computation."
)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 10 else f"{value:.0f}"
