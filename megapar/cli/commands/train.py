"""`megapar train`: train a model."""

import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megapar.cli.command import Call, Command
from megapar.config.errors import ConfigError, UserError
from megapar.config.schema import TrainConfig
from megapar.config.tasks import has_reference

if TYPE_CHECKING:
    from megapar.cli.compose import Overrides
    from megapar.launch.copies import Copies
    from megapar.launch.rank import Job

ENTRY = "megapar.train.loop:run"
NO_SLOTS = "run.slots_file: no rank may run"
SLOTS_S = 60.0  # that a restart waits for a number of slots


def run(config: TrainConfig, call: Call) -> int:
    """Train on ranks of this machine, and draw the run. Returns the exit code."""
    with ExitStack() as claims:
        train(config, call, claims)
    return 0


def train(config: TrainConfig, call: Call, claims: ExitStack | None, quiet: bool = False) -> bool:
    """Train, restart, and draw the run. Returns whether there was anything to do. Raises UserError, RankFailure and
    KeyboardInterrupt, which has the command that goes on.

    claims: holds the run directory; None: the caller does. quiet: nothing of the ranks on the terminal
    """
    from megapar.cli.finish import slots
    from megapar.cli.output import say
    from megapar.launch.copies import copies
    from megapar.launch.failure import Stopped
    from megapar.launch.restart import launch_until_done
    from megapar.launch.signals import finished

    with ExitStack() as held:
        memory = held.enter_context(copies()) if config.checkpoint.replicate else None
        if slots(config) == 0:
            say(NO_SLOTS)
            raise Stopped
        job = plan(config, call, claims, memory=memory)
        if job is None:
            return False
        with saying_how_to_go_on(job, call.overrides), keeping_copies(job, memory):
            again = partial(going_on, config, call, memory=memory)
            launch_until_done(job, config.run.max_restarts, again, say, quiet, slots_changed(config))
        with finished():
            draw(job)
        return True


@contextmanager
def keeping_copies(job: "Job", memory: "Copies | None") -> Iterator[None]:
    """A run that does not go on by itself keeps what it has in memory, which ends with the launcher: on disk."""
    from megapar.cli.output import say
    from megapar.launch.failure import RankFailure, Stopped
    from megapar.launch.resume import keep_copy

    try:
        yield
    except (Stopped, RankFailure, UserError):
        if memory is not None:
            try:
                if (kept := keep_copy(Path(job.folder), memory)) is not None:
                    say(f"run: {kept} has the state that was in memory")
            except UserError as error:
                say(f"run: the state in memory is lost: {error}")
        raise


def going_on(config: TrainConfig, call: Call, folder: str, memory: "Copies | None" = None) -> "Job | None":
    """The job that goes on with a run in its directory, which the caller holds; None: it is finished. Raises Stopped
    where no rank may run."""
    from megapar.cli.finish import slots
    from megapar.cli.output import say
    from megapar.config.keys import changed
    from megapar.launch.failure import Stopped

    if _slots_again(config, slots) == 0:
        say(NO_SLOTS)
        raise Stopped
    return plan(changed(config, {"run.dir": folder, "train.resume": "auto"}), call, None, memory=memory)


def _slots_again(config: TrainConfig, look: Callable[[TrainConfig], int | None]) -> int | None:
    """The slots, waited for where whoever writes the file is not done: a run that has started need not end for that."""
    from megapar.cli.output import say

    deadline, said = time.monotonic() + SLOTS_S, False
    while True:
        try:
            return look(config)
        except UserError as error:
            if time.monotonic() > deadline:
                raise
            if not said:
                say(f"run: {error}; waiting for it, {SLOTS_S:.0f} s")
            said = True
            time.sleep(0.2)


def slots_changed(config: TrainConfig) -> Callable[[int], str | None] | None:
    """What tells an elastic run of so many ranks why it had better go on with more or fewer, or None if it had not."""
    from megapar.cli.finish import check_early, slots
    from megapar.launch.machine import num_gpus

    if config.run.slots_file is None:
        return None
    better: dict[int | None, int] = {}  # ranks by slots

    def changed(ranks: int) -> str | None:
        try:
            if (count := slots(config)) == 0:
                return NO_SLOTS
            if count not in better:
                better[count] = check_early(config, num_gpus()).parallel.layout.world
        except UserError:  # half written, or a number for which there is no layout: it may be another soon
            return None
        return None if better[count] == ranks else f"run.slots_file: {count} ranks may run"

    return changed


def plan(
    config: TrainConfig,
    call: Call,
    claims: ExitStack | None,
    *,
    world_size: int | None = None,
    memory: "Copies | None" = None,
) -> "Job | None":
    """The job for the ranks, the run directory being made, see `Plan`; None: the run is finished. Raises UserError.

    memory: the run's copies in shared memory
    """
    from megapar.cli.finish import finish, rank_environment
    from megapar.cli.output import say
    from megapar.config.file import dump
    from megapar.config.keys import changed
    from megapar.convert import keep_origin
    from megapar.kernels import select_backends
    from megapar.launch import resume, rundir
    from megapar.launch.copies import copies_of_torchrun
    from megapar.launch.rank import Job, name_of

    config = finish(config, world_size)
    refuse_untrained(config)
    if config.checkpoint.replicate and world_size is not None:
        memory = copies_of_torchrun(call.copies)
    backends = select_backends(config.kernels.backend, config.train.device, config.train.dtype)
    resume.decide(config, memory)  # what is refused is refused before a directory is made
    config = rundir.claim(config, claims)
    start = resume.decide(config, memory)
    for line in start.said:
        say(line)
    if start.way == "done":
        resume.copy_summary(config)
        return None
    for line in resume.prepare(config, start):
        say(line)
    rundir.write(config, call.overrides, backends)
    for origin in (config.checkpoint.weights, config.checkpoint.load):
        if origin is not None:
            keep_origin(origin, Path(str(config.run.dir)))
    ranks = changed(config, {"checkpoint.load": start.load})
    if start.load is not None:
        ranks = changed(ranks, {"checkpoint.weights": None})
    if start.partition is not None:
        ranks = changed(ranks, {"pipeline.partition": start.partition})
    layout = config.parallel.layout
    processes = "1 process" if layout.world == 1 else f"{layout.world} processes"
    say(f"run: {config.run.dir}, layout {layout}, {processes} on {config.train.device}")
    return Job(
        kind=name_of(TrainConfig),
        config=dump(ranks),
        entry=call.entry or ENTRY,
        folder=str(config.run.dir),
        device=config.train.device,
        timeout_s=config.train.timeout.total_seconds(),
        ranks=layout.world,
        grace_s=config.run.grace_s,
        stop_at=None if config.run.time_limit_s is None else call.start + config.run.time_limit_s,
        watchdog_s=config.run.watchdog_s or config.train.timeout.total_seconds(),
        env=rank_environment(config.kernels.backend),
        schedules=schedules_for(ranks),
        copies=None if memory is None else str(memory.folder),
    )


def refuse_untrained(config: TrainConfig) -> None:
    """Raise ConfigError where what stands beside the model, and is never trained, would have random weights."""
    if config.model.lora.rank and config.model.lora.base is None:
        problem = "adapters would stand beside random weights; give checkpoint.weights=RUN, or model.lora.base=RUN"
        raise ConfigError("model.lora.base", None, problem)
    if has_reference(config) and config.task.reference is None:
        problem = "the reference would have random weights; give checkpoint.weights=RUN, or task.reference=RUN"
        problem += ", or use task.kl=0" if config.task.name == "policy" else ""
        raise ConfigError("task.reference", None, problem)


def schedules_for(config: TrainConfig) -> dict[str, str]:
    """What ranks would have to search for, each alike."""
    from megapar.config.stages import make_schedule
    from megapar.schedule.build import generators, searched

    name = config.pipeline.schedule
    if config.parallel.pp > 1 and name in generators() and generators()[name].searches:
        make_schedule(config)
    return searched()


@contextmanager
def saying_how_to_go_on(job: "Job", overrides: list[str]) -> Iterator[None]:
    """Give an interruption the command that goes on with the run, if it has a checkpoint, or was asked to stop."""
    from megapar.launch.failure import Stopped
    from megapar.launch.resume import has_checkpoint

    try:
        yield
    except KeyboardInterrupt as interruption:
        if isinstance(interruption, Stopped) or has_checkpoint(Path(job.folder)):
            raise type(interruption)(command_line(overrides, job.folder)) from None
        raise


def command_line(overrides: list[str], folder: str, *options: str) -> str:
    """The command that goes on with what was started with these overrides in a folder."""
    own = [text for text in overrides if text.partition("=")[0] not in ("run.dir", "train.resume")]
    return shlex.join(["megapar", "train", *options, *own, f"run.dir={folder}"])


def draw(job: "Job") -> None:
    """Draw the picture of a finished run, and say where it is."""
    from megapar.cli.output import show
    from megapar.launch.rundir import RESTARTS
    from megapar.report.picture import draw as draw_run

    folder = Path(job.folder)
    try:
        path = draw_run(folder)
    except (OSError, UserError) as error:  # the training is done all the same
        show(f"picture     none: {error}")
        return
    if path is not None:
        show(f"picture     {path}")
    if (folder / RESTARTS).exists():
        failures = len((folder / RESTARTS).read_text(encoding="utf-8").splitlines())
        show(f"restarts    {failures}, see {folder / RESTARTS}")
    if (folder / "trace.json").exists():
        costs = "; its costs in costs.json" if (folder / "costs.json").exists() else ""
        show(f"trace       {folder / 'trace.json'}, for ui.perfetto.dev or chrome://tracing{costs}")


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
