"""`megapar sweep`: the table of a sweep."""

from dataclasses import dataclass
from pathlib import Path

from megapar.cli.command import Call, Command
from megapar.config.errors import ConfigError
from megapar.config.keys import check_values, group, option
from megapar.config.run_sections import RunConfig


@dataclass(frozen=True)
class SweepConfig:
    """`megapar sweep`: the table of a sweep, which starts nothing."""

    run: RunConfig = group(RunConfig, "run.dir: the folder of the sweep")
    out: str | None = option(
        None, "file for the table as CSV; default: the terminal alone", verbatim=True, path=True, identity=False
    )


def run(config: SweepConfig, call: Call) -> int:
    """Print the points of a sweep. Returns the exit code. Raises ConfigError where there is no sweep."""
    from megapar.cli.ledger import Ledger
    from megapar.cli.output import refuse_bad_out
    from megapar.cli.table import as_csv, states_now, table
    from megapar.files import write_atomic

    check_values(config)
    if config.run.dir is None:
        raise ConfigError("run.dir", None, "says which sweep; give the folder of one: megapar sweep DIR")
    refuse_bad_out(config.out, None)
    folder = Path(config.run.dir)
    rows = states_now(folder, Ledger(folder).latest())
    if not rows:
        raise ConfigError("run.dir", config.run.dir, "holds no sweep (no ledger.jsonl); name the folder of one")
    print(table(folder, rows))
    if config.out is not None:
        write_atomic(Path(config.out), as_csv(folder, rows))
    return 0


COMMAND = Command(
    name="sweep",
    config=SweepConfig,
    run=run,
    order=1,
    about="print the table of a sweep, of what `megapar train -m` has done so far",
    examples=[
        ("megapar sweep runs/SWEEP", "every point: state, losses, speed"),
        ("megapar sweep runs/SWEEP out=sweep.csv", "for a spreadsheet"),
    ],
    most_used=["run.dir", "out"],
    positional="run.dir",
)
