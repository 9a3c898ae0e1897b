"""What the commands do once their configuration is composed: derive, check, prepare data, make the run directory."""

import sys
from pathlib import Path
from typing import TypeVar

from megapar.config import (
    ConfigError,
    GenerateConfig,
    PrepareConfig,
    TrainConfig,
    VerifyConfig,
    check,
    check_generate,
    layout_of,
    resolve,
    resolve_generate,
)
from megapar.config.file import dump
from megapar.config.parse import changed
from megapar.kernels import select_backends
from megapar.launch import rundir
from megapar.launch.machine import num_gpus
from megapar.launch.rank import GENERATE, TRAIN, Job

T = TypeVar("T", TrainConfig, VerifyConfig)


def say(line: str) -> None:
    """A line about what is going on, beside the results on standard output."""
    print(line, file=sys.stderr, flush=True)


def finish(config: T, world_size: int | None = None) -> T:
    """The config as the ranks get it: everything derived and checked, the data prepared.

    world_size: ranks that are running already. Raises UserError before anything was started or written but data files.
    """
    gpus = num_gpus()
    draft = check_early(config, gpus, world_size)
    if world_size is None:
        from megapar.launch.local import start_fork_server

        start_fork_server(layout_of(draft).world)  # imports torch while we prepare the data
    from megapar.data.prepare import check as check_data
    from megapar.data.prepare import prepare

    prepared = prepare(config.data, log=say)
    check_data(prepared.prefix, config.data.verify)
    sizes = {"vocab_size": prepared.vocab_size, "max_token": prepared.max_token}
    config = resolve(config, **sizes, num_gpus=gpus, world_size=world_size)
    check(config, num_gpus=gpus, world_size=world_size)
    return changed(config, {"data.prefix": str(prepared.prefix)})


def check_early(config: T, gpus: int, world_size: int | None = None) -> T:
    """Derive and check what can be without the data: refuses in a moment. Returns the config so far."""
    draft = resolve(config, num_gpus=gpus, world_size=world_size)
    check(draft, num_gpus=gpus, world_size=world_size)
    return draft


def plan(
    config: TrainConfig | GenerateConfig, overrides: list[str], world_size: int | None = None, entry: str | None = None
) -> Job:
    """The job for the ranks of `train` or `generate`.

    world_size: ranks that run already; entry: what each calls, if not the command's own. Raises UserError.
    """
    if isinstance(config, GenerateConfig):
        return _plan_generate(config, world_size, entry or GENERATE)
    return _plan_train(config, overrides, world_size, entry or TRAIN)


def _plan_train(config: TrainConfig, overrides: list[str], world_size: int | None, entry: str) -> Job:
    config = finish(config, world_size)
    config = rundir.create(config, overrides, select_backends(config.kernels.backend))
    layout = layout_of(config)
    processes = "1 process" if layout.world == 1 else f"{layout.world} processes"
    say(f"run: {config.run.dir}, layout {layout}, {processes} on {config.train.device}")
    return Job(
        command="train",
        config=dump(config),
        entry=entry,
        folder=str(config.run.dir),
        device=config.train.device,
        timeout_s=config.train.timeout_s,
        ranks=layout.world,
    )


def _plan_generate(config: GenerateConfig, world_size: int | None, entry: str) -> Job:
    if config.run.dir is None:
        raise ConfigError("run.dir", None, "says which run's model writes; give run.dir=RUN")
    gpus = num_gpus()
    config = resolve_generate(config, num_gpus=gpus, world_size=world_size)
    trained = rundir.load_config(config.run.dir)
    if config.checkpoint.load is not None and not Path(config.checkpoint.load).is_dir():
        raise ConfigError("checkpoint.load", config.checkpoint.load, "no such folder; leave it out for the run's last")
    check_generate(config, trained, num_gpus=gpus, world_size=world_size)
    return Job(
        command="generate",
        config=dump(config),
        entry=entry,
        folder=str(config.run.dir),
        device=config.device,
        timeout_s=trained.train.timeout_s,
        ranks=layout_of(config).world,
        log_name="generate-rank",
    )


def draw(job: Job) -> None:
    """Draw the picture of a finished run."""
    from megapar.report.picture import draw as draw_run

    if path := draw_run(Path(job.folder)):
        print(f"picture     {path}")


def verify(config: VerifyConfig, overrides: list[str]) -> int:
    """Compare layouts. Returns the exit code."""
    config = finish(config)
    config = rundir.create(config, overrides, select_backends(config.kernels.backend))
    import megapar.verify

    return megapar.verify.run(config)


def data(config: PrepareConfig) -> int:
    """Make or check token files and print what they hold. Returns the exit code."""
    from megapar.config.check import check_values
    from megapar.data.prepare import check as check_data
    from megapar.data.prepare import prepare

    check_values(config)
    prepared = prepare(config.data, prefix=config.out, log=say)
    check_data(prepared.prefix, config.data.verify)
    vocabulary = "unknown" if prepared.vocab_size is None else f"{prepared.vocab_size:,}"
    rows = [
        ("files", f"{prepared.prefix}.bin, .idx, .json"),
        ("tokenizer", str(prepared.tokenizer_path or "none")),
        ("vocabulary", vocabulary),
        ("largest token", f"{prepared.max_token:,}"),
        ("tokens", f"{prepared.tokens:,}"),
        ("documents", f"{prepared.documents:,}"),
        ("checked", "every byte" if config.data.verify == "full" else "sizes, index and samples"),
    ]
    for name, value in rows:
        print(f"{name:<14} {value}")
    return 0
