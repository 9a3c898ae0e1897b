"""`megapar bench kernels`: time kernels beside those of other libraries."""

import os
from pathlib import Path

from megapar.bench.config import BenchKernelsConfig
from megapar.cli.command import Call, Command


def run(config: BenchKernelsConfig, call: Call) -> int:
    """Time kernels, write the rows, tables and plots, and print the tables. Returns the exit code."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler counts memory and would talk about it
    from megapar.bench import plots, rows, tables
    from megapar.bench import run as runs
    from megapar.cli.output import say
    from megapar.launch import rundir
    from megapar.launch.machine import num_gpus

    bench = runs.understand(config, num_gpus(), say)
    out = Path(config.out) if config.out is not None else rundir.default_folder("bench", key="out")
    rundir.make_writable(out, key="out")
    drawn = plots.names(runs.benches())
    for name in ("bench.csv", "bench.md", *drawn):  # what this run does not draw would be another's
        (out / name).unlink(missing_ok=True)
    found: list[rows.Row] = []
    try:
        for row in runs.run(bench, say):
            found.append(row)
    finally:  # an interrupted sweep leaves what it had measured
        rows.write(found, out / "bench.csv")
    (out / "bench.md").write_text(tables.markdown(found), encoding="utf-8")
    pictures = plots.plots(found)
    for name, picture in pictures.items():
        (out / name).write_text(picture, encoding="utf-8")
    print(tables.terminal(found))
    say(f"{out}: bench.csv, bench.md" + (f", {len(pictures)} plots" if pictures else ""))
    return 0


COMMAND = Command(
    name="bench kernels",
    config=BenchKernelsConfig,
    run=run,
    order=7,
    about="time the kernels beside those of other libraries, and beside what a GPU could do at most",
    examples=[
        ("megapar bench kernels", "all kernels: measured on a GPU; on a CPU plain torch is timed and ours are read"),
        ("megapar bench kernels kernel=[attention] sweep=full out=bench", "one kernel, every shape, lengths up to 32k"),
        ("megapar bench kernels provider=[megapar,torch,flash_attn,liger_kernel]", "against every library (on a GPU)"),
        (
            "megapar bench kernels kernel=[rope] kernels.backend=interpret",
            "ours in the interpreter, to see that it runs",
        ),
    ],
    most_used=[
        *("kernel", "provider", "mode", "shape", "tokens", "sweep", "dtype", "device", "kernels.backend", "targets"),
        "out",
    ],
)
