"""`megapar eval`: figures of a run's model."""

from contextlib import ExitStack
from typing import TYPE_CHECKING

from megapar.cli.command import Call, Command
from megapar.evaluate.config import EvalConfig

if TYPE_CHECKING:
    from megapar.launch.rank import Job

ENTRY = "megapar.evaluate.run:run_rank"


def run(config: EvalConfig, call: Call) -> int:
    """Evaluate on ranks of this machine. Returns the exit code."""
    from megapar.launch.local import launch

    launch(plan(config, call, None))
    return 0


def plan(config: EvalConfig, call: Call, claims: ExitStack | None, *, world_size: int | None = None) -> "Job":
    """The job for the ranks, see `Plan`. Raises UserError."""
    from megapar.cli import forward
    from megapar.cli.output import refuse_bad_out

    refuse_bad_out(config.out, None)
    config, trained = forward.resolve(config, world_size)
    from megapar.evaluate.run import read, subject_of

    read(subject_of(config, trained))  # refuses what ranks would
    return forward.job(config, trained, call, ENTRY, "eval")


COMMAND = Command(
    name="eval",
    config=EvalConfig,
    run=run,
    plan=plan,
    order=3,
    positional="run.dir",
    about="evaluate a trained model on your own text and questions",
    examples=[
        ("megapar eval runs/demo text=held_out.txt", "perplexity, bits per byte"),
        ("megapar eval runs/demo choices=quiz.jsonl out=quiz.json", "multiple choice by log-likelihood"),
        ("megapar eval runs/chat match=tasks.jsonl parallel=tp2", "exact match of greedy answers, on two ranks"),
        ("megapar eval runs/digits media=shards/valid", "a table of what each modality, pair and all of them say"),
        ("megapar eval runs/sorter labels=test.jsonl", "a classifier's accuracy, precision and recall"),
    ],
    most_used=[
        *("run.dir", "text", "choices", "match", "labels", "media", "stride", "batch_size", "dtype"),
        *("parallel.tp", "parallel.pp", "parallel.dp", "checkpoint.load", "out"),
    ],
)
