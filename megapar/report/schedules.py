"""Pipeline schedules side by side, simulated; one of them drawn."""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megapar.config.check import check_schedule_name
from megapar.config.errors import ConfigError
from megapar.config.keys import check_values
from megapar.report.config import CostsConfig, ScheduleConfig
from megapar.report.svg import WIDTH, document, page
from megapar.report.timeline import Lane, action_bar, draw_lanes, readable_width
from megapar.schedule.actions import Schedule, ScheduleError
from megapar.schedule.build import CSV, build, default_chunks, generators, refusal, refuse_chunks
from megapar.schedule.check import check
from megapar.schedule.costs import Costs, read_costs
from megapar.schedule.simulate import Simulation, simulate

_EVEN = CostsConfig()
HEAVIER = 0.4  # of the last stage, in the comparison with balance: a head's share in a model of a few layers per stage

MOST_PASSES = 1 << 21  # stages times micro-batches of a comparison: some minutes and a few GB


@dataclass(frozen=True)
class Candidate:
    """A schedule that was built, proven and replayed, with even stages as asked for, and with a heavier last one."""

    name: str
    chunks: int
    schedule: Schedule
    simulation: Simulation
    heavier: Simulation

    @property
    def peak(self) -> float:
        return max(self.simulation.peak)

    def row(self) -> dict[str, Any]:
        """The figures of the comparison. Times in the costs' unit, memory in micro-batches of a whole rank."""
        return {
            "schedule": self.name,
            "chunks": self.chunks,
            "step_time": self.simulation.step_time,
            "bubble": self.simulation.mean_bubble,
            "own_bubble": max(self.simulation.own_bubble),
            "peak_memory": self.peak,
            "exposed_comm": max(self.simulation.exposed),
            "bubble_last_stage_heavier": self.heavier.mean_bubble,
        }


@dataclass(frozen=True)
class Comparison:
    config: ScheduleConfig
    candidates: list[Candidate]
    refused: dict[str, str]

    def text(self) -> str:
        """The table, what could not be had, and what balance is worth."""
        limit = self.config.memory_limit
        slowest = max(found.simulation.step_time for found in self.candidates)
        digits = 2 if slowest >= 1 else 3 - math.floor(math.log10(slowest))  # seconds, as a run measures them
        lines = [
            f"{'schedule':<14} {'chunks':>6} {'step time':>10} {'bubble':>7} {'own':>6} {'memory':>7} {'exposed':>8}"
        ]
        for found in sorted(self.candidates, key=lambda found: (found.simulation.step_time, found.peak)):
            row = found.row()
            over = "  over memory_limit" if limit is not None and found.peak > limit + 1e-9 else ""
            lines.append(
                f"{_short(found.name):<14} {found.chunks:>6} {row['step_time']:>10.{digits}f} {row['bubble']:>7.1%} "
                f"{row['own_bubble']:>6.1%} {row['peak_memory']:>7.2f} {row['exposed_comm']:>8.{digits}f}{over}"
            )
        lines += [f"{name:<14} {why}" for name, why in self.refused.items()]
        lines += ["", *self._about(), *_LEGEND, "", *self._balance()]
        return "\n".join(lines)

    def _about(self) -> list[str]:
        """Of one schedule what it is, and whether it needs sends that don't wait for their receiver, as ours."""
        if self.config.pipeline.schedule == "all":
            return []
        [found] = self.candidates
        stops = check(found.schedule, rendezvous=True).rendezvous
        known = generators().get(found.name)
        return [
            *([f"{found.name}: {known.about}"] if known else []),
            "with sends that wait for their receiver it would "
            + (f"stop: {stops}" if stops else "run, too, as it is lowered here"),
            "",
        ]

    def _balance(self) -> list[str]:
        by_bubble = sorted(self.candidates, key=lambda found: found.simulation.mean_bubble)
        lines = [f"a last stage {HEAVIER:.0%} of a rank's layers heavier:"]
        for found in by_bubble:
            even, heavy = found.simulation.mean_bubble, found.heavier.mean_bubble
            name = f"{_short(found.name)} x{found.chunks}"
            lines.append(f"  {name:<16} bubble {even:>6.1%} -> {heavy:>6.1%}, {100 * (heavy - even):+.1f} points")
        if len(by_bubble) > 1:
            choice = by_bubble[-1].simulation.mean_bubble - by_bubble[0].simulation.mean_bubble
            balance = [found.heavier.mean_bubble - found.simulation.mean_bubble for found in by_bubble]
            lines.append(
                f"balance is worth {100 * min(balance):.1f} to {100 * max(balance):.1f} points here, "
                f"the choice of a schedule up to {100 * choice:.1f}"
            )
        return lines


_LEGEND = (
    "bubble: idle share of the step, mean over ranks; own: between a rank's own first and last action, the worst rank",
    "memory: activations, 1 = one micro-batch on a whole rank; exposed: time a rank waits for transfers alone",
)


def _short(name: str) -> str:
    return f"{CSV}{Path(name).name}" if name.startswith(CSV) else name


def compare(config: ScheduleConfig) -> Comparison:
    """Build, prove and replay what the config asks for. Raises ConfigError."""
    check_values(config)
    name = config.pipeline.schedule
    if name != "all":
        check_schedule_name("pipeline.schedule", name)
    given = given_costs(config)
    if config.stages * config.microbatches * (config.chunks or 1) > MOST_PASSES:
        problem = f"with {config.stages} stages and {config.chunks or 1} chunks too many to compare; use fewer"
        raise ConfigError("microbatches", config.microbatches, problem)
    try:
        wanted = _wanted(config)
    except ScheduleError as error:  # of a table that can't be read
        raise ConfigError("pipeline.schedule", name, str(error)) from None
    candidates, refused = [], {}
    for known, chunks in wanted:
        try:
            candidates.append(_candidate(config, known, chunks, given))
        except ScheduleError as error:
            if name != "all":
                raise ConfigError("pipeline.schedule", name, str(error)) from None
            refused[known] = str(error)
    if not candidates:  # with costs of another number of stages
        raise ConfigError("stages", config.stages, "; ".join(sorted(set(refused.values()))))
    return Comparison(config, candidates, refused)


def _wanted(config: ScheduleConfig) -> list[tuple[str, int]]:
    """(schedule, stages per rank) of every row of the comparison."""
    name = config.pipeline.schedule
    if name != "all":
        chunks = config.chunks or default_chunks(name)
        if why := refuse_chunks(name, chunks):
            raise ConfigError("chunks", chunks, why)
        return [(name, chunks)]
    wanted = []
    for known, generator in generators().items():
        takes = generator.chunks
        if len(takes) == 1:
            wanted.append((known, takes.start))
        elif config.chunks is not None:
            wanted.append((known, config.chunks))
        else:
            wanted += [(known, chunks) for chunks in sorted({takes.start, 2}) if chunks in takes]
    return wanted


def _candidate(config: ScheduleConfig, name: str, chunks: int, given: Costs | None) -> Candidate:
    """Raises ScheduleError where the schedule can't be had."""
    if why := refusal(name, config.stages, config.microbatches, chunks):
        raise ScheduleError(why)
    limit = float("inf") if config.memory_limit is None else config.memory_limit

    def replay(costs: Costs) -> tuple[Schedule, Simulation]:
        sizes = (config.stages, config.microbatches)
        built = build(name, *sizes, chunks=chunks, costs=costs, memory_limit=limit)
        check(built)
        return built, simulate(built, costs)

    stages = config.stages * chunks
    if given is None:
        numbers = asdict(config.costs)
        del numbers["file"]
        costs = Costs.even(config.stages, stages, **numbers)
    else:
        costs = given.merged(stages)
    schedule, simulation = replay(costs)
    _, heavier = replay(_with_heavy_last_stage(costs, config.stages))
    return Candidate(name, chunks, schedule, simulation, heavier)


def _with_heavy_last_stage(costs: Costs, ranks: int) -> Costs:
    """HEAVIER of what a rank has on average is added to the last stage, however many stages a rank has."""
    forward, input_grad, weight_grad = (
        (*values[:-1], values[-1] + HEAVIER * sum(values) / ranks)
        for values in (costs.forward, costs.input_grad, costs.weight_grad)
    )
    return replace(costs, forward=forward, input_grad=input_grad, weight_grad=weight_grad)


def given_costs(config: ScheduleConfig) -> Costs | None:
    """The costs of costs.file, None without it. Raises ConfigError."""
    path = config.costs.file
    if path is None:
        return None
    changed = [key for key, value in asdict(config.costs).items() if key != "file" and value != getattr(_EVEN, key)]
    if changed:
        raise ConfigError("costs.file", path, f"says all costs; leave out costs.{changed[0]}, or put it into the file")
    try:
        return read_costs(path, config.stages)
    except ScheduleError as error:
        raise ConfigError("costs.file", path, str(error)) from None


def draw(config: ScheduleConfig, found: Candidate) -> str:
    """The timeline of a schedule as SVG, or wrapped as HTML where config.plot ends so; a bar's hover is its action."""
    simulation, chunks = found.simulation, found.chunks
    lanes = []
    for rank, spans in enumerate(simulation.spans):
        stages = found.schedule.stages_of(rank)
        names = f"stage{'s' * (chunks > 1)} {', '.join(map(str, stages))}" if chunks <= 3 else f"with {chunks} stages"
        lane = Lane(f"rank {rank}  {names}")
        for start, end, action in spans:
            lane.bars.append(action_bar(action, start, end, stages, f"{action}  {start:g} to {end:g}"))
        lanes.append(lane)
    title = (
        f"{_short(found.name)}, {config.stages} ranks of {chunks} stage{'s' if chunks > 1 else ''}, "
        f"{config.microbatches} micro-batches: step {simulation.step_time:g}, bubble {simulation.mean_bubble:.1%}, "
        f"memory {found.peak:g} micro-batches"
    )
    width = readable_width(lanes, 0.0, simulation.step_time)
    body, height = draw_lanes(title, lanes, 0.0, simulation.step_time, 30, width=width, unit="time")
    if str(config.plot).endswith(".svg"):
        return document(body, max(width, WIDTH), height)
    return page(title, body, max(width, WIDTH), height)
