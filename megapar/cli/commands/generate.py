"""`megapar generate`: let the model of a run write."""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from megapar.cli.command import Call, Command
from megapar.config.errors import ConfigError
from megapar.config.schema import GenerateConfig

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
    from megapar.cli.finish import rank_environment
    from megapar.cli.output import refuse_bad_out
    from megapar.config import check_generate, resolve_generate
    from megapar.config.file import dump, load_config
    from megapar.launch.machine import num_gpus
    from megapar.launch.rank import Job, name_of

    if config.run.dir is None:
        raise ConfigError("run.dir", None, "says which run's model writes; give run.dir=RUN")
    gpus = num_gpus()
    config = resolve_generate(config, num_gpus=gpus, world_size=world_size)
    folder = Path(str(config.run.dir))
    trained = load_config(folder)
    refuse_bad_out(config.out, None)
    if config.checkpoint.load is not None and not Path(config.checkpoint.load).is_dir():
        raise ConfigError("checkpoint.load", config.checkpoint.load, "no such folder; leave it out for the run's last")
    check_generate(config, trained, num_gpus=gpus, world_size=world_size)
    from megapar.checkpoint import find_checkpoint, read_manifest  # torch: only when nothing cheaper refuses

    read_manifest(find_checkpoint(config.checkpoint.load or folder))
    from megapar.generate.prompts import read_prompts, tokens_of
    from megapar.generate.text import prompt_tokens, run_tokenizer

    tokenizer = run_tokenizer(folder, trained)  # refuses what ranks would, and so do these
    if config.prompt_file is None:
        prompt_tokens(tokenizer, config.prompt, config.chat)
    else:
        tokens_of(tokenizer, read_prompts(config.prompt_file), config.chat, trained.train.seq_length)
    return Job(
        kind=name_of(GenerateConfig),
        config=dump(config),
        entry=call.entry or ENTRY,
        folder=str(folder),
        device=config.device,
        timeout_s=trained.train.timeout.total_seconds(),
        ranks=config.parallel.layout.world,
        log_name="generate-rank",
        env=rank_environment(config.kernels.backend),
    )


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
