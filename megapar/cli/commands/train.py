"""`megapar train`: train a model."""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from megapar.cli.command import Call, Command
from megapar.config.errors import ConfigError, UserError
from megapar.config.schema import TrainConfig

if TYPE_CHECKING:
    from megapar.cli.compose import Overrides
    from megapar.launch.rank import Job

ENTRY = "megapar.train.loop:run"


def run(config: TrainConfig, call: Call) -> int:
    """Train on ranks of this machine, and draw the run. Returns the exit code."""
    from megapar.launch.local import launch

    with ExitStack() as claims:
        job = plan(config, call, claims)
        launch(job)
        draw(job)
    return 0


def plan(config: TrainConfig, call: Call, claims: ExitStack | None, *, world_size: int | None = None) -> "Job":
    """The job for the ranks, the run directory being made, see `Plan`. Raises UserError."""
    from megapar.cli.finish import finish, rank_environment
    from megapar.cli.output import say
    from megapar.config.file import dump
    from megapar.kernels import select_backends
    from megapar.launch import rundir
    from megapar.launch.rank import Job, name_of

    config = finish(config, world_size)
    backends = select_backends(config.kernels.backend, config.train.device, config.train.dtype)
    config = rundir.create(config, call.overrides, backends, claims, steps_done=steps_done(config))
    layout = config.parallel.layout
    processes = "1 process" if layout.world == 1 else f"{layout.world} processes"
    say(f"run: {config.run.dir}, layout {layout}, {processes} on {config.train.device}")
    return Job(
        kind=name_of(TrainConfig),
        config=dump(config),
        entry=call.entry or ENTRY,
        folder=str(config.run.dir),
        device=config.train.device,
        timeout_s=config.train.timeout.total_seconds(),
        ranks=layout.world,
        env=rank_environment(config.kernels.backend),
        schedules=schedules_for(config),
    )


def schedules_for(config: TrainConfig) -> dict[str, str]:
    """What ranks would have to search for, each alike."""
    from megapar.config.stages import make_schedule
    from megapar.schedule.build import generators, searched

    name = config.pipeline.schedule
    if config.parallel.pp > 1 and name in generators() and generators()[name].searches:
        make_schedule(config)
    return searched()


def steps_done(config: TrainConfig) -> int:
    """Training steps of the checkpoint that a finished config starts from, 0 without one.

    Raises UserError where it can't be read, is of another model or other data, or leaves nothing to do.
    """
    if config.checkpoint.load is None:
        return 0
    from megapar.checkpoint import find_checkpoint, read_manifest
    from megapar.checkpoint.load import refuse_other_model, refuse_other_order

    try:
        folder = find_checkpoint(config.checkpoint.load)
        manifest = read_manifest(folder)
    except UserError as error:
        raise ConfigError("checkpoint.load", config.checkpoint.load, str(error)) from None
    refuse_other_model(manifest, config, folder)
    refuse_other_order(manifest, config, folder)
    if manifest.step >= config.train.steps:
        problem = f"{folder} has done {manifest.step} steps already; use more, or an earlier checkpoint"
        raise ConfigError("train.steps", config.train.steps, problem)
    return manifest.step


def draw(job: "Job") -> None:
    """Draw the picture of a finished run, and say where it is."""
    from megapar.report.picture import draw as draw_run

    folder = Path(job.folder)
    try:
        path = draw_run(folder)
    except (OSError, UserError) as error:  # the training is done all the same
        print(f"picture     none: {error}")
        return
    if path is not None:
        print(f"picture     {path}")
    if (folder / "trace.json").exists():
        print(f"trace       {folder / 'trace.json'}, for ui.perfetto.dev or chrome://tracing; its costs in costs.json")


def sweep(overrides: "Overrides", entry: str | None) -> int:
    """Train with every combination of the overrides. Returns the exit code."""
    from megapar.cli.sweep import sweep

    return sweep(overrides, entry)


COMMAND = Command(
    name="train",
    config=TrainConfig,
    run=run,
    plan=plan,
    sweep=sweep,
    order=1,
    about="train a model in any tensor x pipeline x data-parallel layout",
    examples=[
        ("megapar train", "one process on a CPU, or dp over all visible GPUs"),
        ("megapar train parallel=tp2pp2dp2", "eight processes, started here"),
        ("megapar train parallel=auto devices=8", "choose the layout"),
        ("megapar train data.path=FOLDER model=gpt2_small", "your own text, another model"),
        ("megapar train experiment=demo train.steps=50", "a whole experiment in one file, one key changed"),
        ("megapar train -m parallel=tp2,pp2,dp2 optim.lr=1e-3,3e-3", "a sweep: every combination"),
        ("torchrun --nproc-per-node 8 -m megapar.cli train parallel=tp2pp2dp2", "ranks started elsewhere"),
    ],
    most_used=[
        *("parallel.tp", "parallel.pp", "parallel.dp", "parallel.sequence_parallel", "parallel.zero"),
        *("pipeline.schedule", "pipeline.partition", "model.layers", "model.hidden", "model.heads", "model.kv_heads"),
        *("train.steps", "train.seq_length", "train.micro_batch_size", "train.global_batch_size", "train.dtype"),
        *("train.eval_every", "train.recompute", "train.trace", "optim.lr", "data.path", "checkpoint.every"),
        *("run.dir", "run.name", "logger.wandb.mode", "kernels.backend", "devices", "out"),
    ],
)
