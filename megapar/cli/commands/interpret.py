"""`megapar interpret`: what a run's model does with a text."""

from contextlib import ExitStack
from typing import TYPE_CHECKING

from megapar.cli import forward
from megapar.cli.command import Call, Command
from megapar.interpret.config import InterpretConfig

if TYPE_CHECKING:
    from megapar.launch.rank import Job

ENTRY = "megapar.interpret.run:run_rank"


def run(config: InterpretConfig, call: Call) -> int:
    """Read on ranks of this machine. Returns the exit code."""
    from megapar.launch.local import launch

    launch(plan(config, call, None))
    return 0


def plan(config: InterpretConfig, call: Call, claims: ExitStack | None, *, world_size: int | None = None) -> "Job":
    """The job for the ranks, see `Plan`. Raises UserError."""
    from pathlib import Path

    from megapar.cli.output import refuse_bad_out

    refuse_bad_out(config.out, None)
    config, trained = forward.resolve(config, world_size)
    from megapar.generate.text import run_tokenizer
    from megapar.interpret.run import tokens_of

    tokens_of(config, run_tokenizer(Path(str(config.run.dir)), trained), trained)  # refuses what ranks would
    return forward.job(config, trained, call, ENTRY, "interpret")


COMMAND = Command(
    name="interpret",
    config=InterpretConfig,
    run=run,
    plan=plan,
    order=3,
    positional="run.dir",
    about="look at what a trained model does with a text",
    examples=[
        ("megapar interpret runs/demo prompt='def main(): '", "a page: next tokens by layer, attention by head"),
        ("megapar interpret runs/demo prompt=x parallel=tp2pp2 out=x.html", "the same from four ranks"),
    ],
    most_used=["run.dir", "prompt", "top", "dtype", "parallel.tp", "parallel.pp", "checkpoint.load", "out"],
)
