"""`megapar status`: what each rank of a run is doing now."""

import json
from dataclasses import dataclass
from pathlib import Path

from megapar.cli.command import Call, Command
from megapar.config.errors import ConfigError
from megapar.config.keys import check_values, group, option
from megapar.config.run_sections import RunConfig


@dataclass(frozen=True)
class StatusConfig:
    """`megapar status`: what each rank of a run is doing now."""

    run: RunConfig = group(RunConfig, "run.dir: the run to look at")
    out: str | None = option(
        None, "file for the table as JSON; default: the terminal alone", verbatim=True, path=True, identity=False
    )


def run(config: StatusConfig, call: Call) -> int:
    """Print a line per rank. Returns 0 if the run is alive on this machine, else 1. Raises ConfigError for no run."""
    import time

    from megapar.cli.output import refuse_bad_out
    from megapar.files import write_atomic
    from megapar.launch.rundir import SUMMARY, is_held
    from megapar.launch.watch import read_board, table

    check_values(config)
    refuse_bad_out(config.out, None)
    folder = Path(config.run.dir or "")
    if config.run.dir is None or not (folder / "config.yaml").exists():
        raise ConfigError("run.dir", config.run.dir, "holds no run; give the folder of one: megapar status RUN")
    rows = table(read_board(folder), time.monotonic())
    if config.out is not None:
        write_atomic(Path(config.out), json.dumps({"run": str(folder), "ranks": rows}, indent=2) + "\n")
    if not rows:
        state = "finished" if (folder / SUMMARY).exists() else "not running on this machine"
        print(f"{folder}: {'running, without a board here' if is_held(folder) else state}")
        return 1
    print(f"{'rank':>4} {'process':>8} {'step':>7} {'for s':>8}  operation")
    for row in rows:
        if row["pid"]:
            print(f"{row['rank']:>4} {row['pid']:>8} {row['step']:>7} {row['seconds']:>8.2f}  {row['text']}")
        else:
            print(f"{row['rank']:>4} {'':>8} {'':>7} {'':>8}  not started")
    return 0


COMMAND = Command(
    name="status",
    config=StatusConfig,
    run=run,
    order=2,
    about="what each rank of a run is doing now, and for how long",
    examples=[
        ("megapar status runs/RUN", "a line per rank: process, step, operation"),
        ("watch -n 1 megapar status runs/RUN", "again every second"),
        ("megapar status runs/RUN out=status.json", "for a program"),
    ],
    most_used=["run.dir", "out"],
    positional="run.dir",
)
