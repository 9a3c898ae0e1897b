"""`megapar generate`: let the model of a run write."""

from contextlib import ExitStack
from typing import TYPE_CHECKING

from megapar.cli import forward
from megapar.cli.command import Call, Command
from megapar.config.run_schema import GenerateConfig

if TYPE_CHECKING:
    from megapar.launch.rank import Job

ENTRY = "megapar.generate.run:run_rank"


def run(config: GenerateConfig, call: Call) -> int:
    """Write on ranks of this machine. Returns the exit code."""
    from megapar.launch.local import launch

    launch(plan(config, call, None))
    return 0


def plan(config: GenerateConfig, call: Call, claims: ExitStack | None, *, world_size: int | None = None) -> "Job":
    """The job for the ranks, see `Plan`. Raises UserError."""
    from megapar.cli.output import refuse_bad_out

    refuse_bad_out(config.out, None)
    config, trained, tokenizer = forward.resolve_writer(config, world_size)
    from megapar.generate.prompts import prompts_of

    prompts_of(config, tokenizer, trained)  # refuses what ranks would
    return forward.job(config, trained, call, ENTRY, "generate")


COMMAND = Command(
    name="generate",
    config=GenerateConfig,
    run=run,
    plan=plan,
    order=3,
    positional="run.dir",
    about="let a trained model write",
    examples=[
        ("megapar generate runs/demo prompt='def main(): '", "continue a text"),
        ("megapar generate runs/demo prompt=x sample.temperature=0", "greedily"),
        ("megapar generate runs/demo prompt=x parallel=tp2", "on two ranks"),
        ("megapar generate runs/demo prompt_file=prompts.txt out=texts.jsonl", "many, several at a time"),
        ("megapar generate runs/demo prompt='How?' chat=true", "answer, by the tokenizer's chat template"),
    ],
    most_used=[
        *(
            "run.dir",
            "prompt",
            "prompt_file",
            "batch_size",
            "chat",
            "sample.max_tokens",
            "sample.temperature",
            "sample.top_k",
            "sample.top_p",
        ),
        *("sample.seed", "parallel.tp", "checkpoint.load", "out"),
    ],
)
