"""`megapar schedule`: compare, write or draw pipeline schedules."""

from pathlib import Path

from megapar.cli.command import Call, Command
from megapar.config.errors import ConfigError
from megapar.report.config import ScheduleConfig


def run(config: ScheduleConfig, call: Call) -> int:
    """Compare pipeline schedules by simulation; write or draw the chosen one. Returns the exit code."""
    import json

    from megapar.cli.output import refuse_bad_out
    from megapar.report.schedules import compare, draw
    from megapar.schedule.table import write

    for key in ("csv", "plot"):
        path = getattr(config, key)
        refuse_bad_out(path, None, key)
        if path is not None and config.pipeline.schedule == "all":
            raise ConfigError(key, path, "is for one schedule; name it: pipeline.schedule=NAME")
    if config.plot is not None and not config.plot.endswith((".svg", ".html")):
        raise ConfigError("plot", config.plot, "draws .svg or .html; name a file that ends so")
    refuse_bad_out(config.out, None)
    comparison = compare(config)
    if config.csv is not None:
        write(comparison.candidates[0].schedule, config.csv)
    if config.plot is not None:
        Path(config.plot).write_text(draw(config, comparison.candidates[0]), encoding="utf-8")
    if config.out is not None:
        rows = [found.row() for found in comparison.candidates]
        Path(config.out).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print(comparison.text())
    return 0


COMMAND = Command(
    name="schedule",
    config=ScheduleConfig,
    run=run,
    order=4,
    about="compare pipeline schedules by simulation, write or draw one",
    examples=[
        ("megapar schedule", "every schedule on 8 ranks with 32 micro-batches"),
        ("megapar schedule stages=4 microbatches=16 costs.I=2 costs.head=0.4", "with a slow backward and a heavy head"),
        (
            "megapar schedule pipeline.schedule=zbv csv=zbv.csv plot=zbv.html",
            "one schedule as a table and as a picture",
        ),
        ("megapar schedule pipeline.schedule=auto chunks=2 memory_limit=6", "the fastest order within a limit"),
    ],
    most_used=[
        *("pipeline.schedule", "stages", "microbatches", "chunks", "memory_limit", "csv", "plot", "out"),
        *("costs.F", "costs.I", "costs.W", "costs.embedding", "costs.head", "costs.latency", "costs.transfer"),
        "costs.file",
    ],
)
