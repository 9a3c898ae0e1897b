"""What the commands do once their configuration is composed: derive, check, prepare data, make the run directory."""

import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

from megapar.config import (
    BenchKernelsConfig,
    BenchOverlapConfig,
    ConfigError,
    GenerateConfig,
    InspectConfig,
    PrepareConfig,
    ScheduleConfig,
    TrainConfig,
    UserError,
    VerifyConfig,
    check,
    check_generate,
    resolve,
    resolve_generate,
)
from megapar.config.file import dump, load_config
from megapar.config.keys import changed
from megapar.kernels import INTERPRET, select_backends
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
    if world_size is None and config.kernels.backend != "interpret":
        from megapar.launch.local import start_fork_server

        start_fork_server(draft.parallel.layout.world)  # imports torch while we prepare the data
    from megapar.data.prepare import check as check_data
    from megapar.data.prepare import prepare

    prepared = prepare(config.data, log=say)
    check_data(prepared.prefix, config.data.verify)
    sizes = {"vocab_size": prepared.vocab_size, "max_token": prepared.max_token}
    config = resolve(config, **sizes, num_gpus=gpus, world_size=world_size)
    check(config, num_gpus=gpus, world_size=world_size)
    if config.task.sample_tokens and prepared.tokenizer_path is None:
        problem = "these token files came without a tokenizer, so nothing can be written; use 0"
        raise ConfigError("task.sample_tokens", config.task.sample_tokens, problem)
    config = changed(config, {"data.prefix": str(prepared.prefix)})
    refuse_few_tokens(config)
    return config


def refuse_few_tokens(config: TrainConfig) -> None:
    """Raise ConfigError where the prepared data has not tokens enough for a sample, or for an evaluation."""
    from megapar.data.samples import SampleSet

    train, prefix = config.train, str(config.data.prefix)
    SampleSet(prefix, split="train", seq_length=train.seq_length, seed=train.seed, holdout=config.data.split)
    if train.eval_every:
        SampleSet(prefix, split="valid", seq_length=train.seq_length, seed=train.seed, holdout=config.data.split)


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


def refuse_bad_out(out: str | None, run_dir: str | None, key: str = "out") -> None:
    """Raise ConfigError where a file can't be written. In the run directory it can: that is yet to be made."""
    if out is None:
        return
    path = Path(out)
    folder = path.parent
    if path.is_dir():
        raise ConfigError(key, out, "is a folder; name a file")
    if run_dir is not None and folder.resolve() == Path(run_dir).resolve() and not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(key, out, "there is no such folder; make it, or name another file")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise ConfigError(key, out, "can't be written; name another file")


def refuse_without_wandb_key(config: TrainConfig) -> None:
    """Raise ConfigError where wandb shall upload and finds no key, nor a place to ask for one."""
    if config.logger.wandb.mode != "online":
        return
    import wandb
    from wandb.sdk import wandb_setup
    from wandb.sdk.lib import wbauth

    host = wandb_setup.singleton().settings.base_url
    remedy = "set WANDB_API_KEY or run `wandb login`, or use offline or disabled"
    try:
        key = wbauth.authenticate_session(host=host, source="megapar", prompt=False, update_session=False)
    except wandb.errors.Error as error:
        raise ConfigError("logger.wandb.mode", "online", f"{str(error).splitlines()[0]}; {remedy}") from None
    if key is None:
        raise ConfigError("logger.wandb.mode", "online", f"there is no key for {host}; {remedy}")


def check_early(config: T, gpus: int, world_size: int | None = None) -> T:
    """Derive and check what can be without the data: refuses in a moment. Returns the config so far."""
    draft = resolve(config, num_gpus=gpus, world_size=world_size)
    check(draft, num_gpus=gpus, world_size=world_size)
    refuse_bad_out(config.out, config.run.dir)
    refuse_without_wandb_key(config)
    return draft


def plan(
    config: TrainConfig | GenerateConfig,
    overrides: list[str],
    claims: ExitStack | None,
    *,
    world_size: int | None = None,
    entry: str | None = None,
) -> Job:
    """The job for the ranks of `train` or `generate`.

    claims: holds the run directory of `train`, see `rundir.create`; world_size: ranks that run already; entry: what
    each calls, if not the command's own. Raises UserError.
    """
    if isinstance(config, GenerateConfig):
        return _plan_generate(config, world_size, entry or GENERATE)
    config = finish(config, world_size)
    backends = select_backends(config.kernels.backend, config.train.device, config.train.dtype)
    config = rundir.create(config, overrides, backends, claims, steps_done=steps_done(config))
    return _train_job(config, entry or TRAIN)


def _train_job(config: TrainConfig, entry: str) -> Job:
    layout = config.parallel.layout
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
        env=rank_environment(config.kernels.backend),
    )


def _plan_generate(config: GenerateConfig, world_size: int | None, entry: str) -> Job:
    if config.run.dir is None:
        raise ConfigError("run.dir", None, "says which run's model writes; give run.dir=RUN")
    gpus = num_gpus()
    config = resolve_generate(config, num_gpus=gpus, world_size=world_size)
    trained = load_config(str(config.run.dir))
    refuse_bad_out(config.out, None)
    if config.checkpoint.load is not None and not Path(config.checkpoint.load).is_dir():
        raise ConfigError("checkpoint.load", config.checkpoint.load, "no such folder; leave it out for the run's last")
    check_generate(config, trained, num_gpus=gpus, world_size=world_size)
    from megapar.checkpoint import find_checkpoint, read_manifest

    read_manifest(find_checkpoint(config.checkpoint.load or str(config.run.dir)))
    return Job(
        command="generate",
        config=dump(config),
        entry=entry,
        folder=str(config.run.dir),
        device=config.device,
        timeout_s=trained.train.timeout_s,
        ranks=config.parallel.layout.world,
        log_name="generate-rank",
        env=rank_environment(config.kernels.backend),
    )


def rank_environment(backend: str) -> dict[str, str]:
    """What a rank's environment must say before it imports the kernels."""
    return {INTERPRET: "1"} if backend == "interpret" else {}


def draw(job: Job) -> None:
    """Draw the picture of a finished run, and say where it is."""
    from megapar.report.picture import draw as draw_run

    folder = Path(job.folder)
    if path := draw_run(folder):
        print(f"picture     {path}")
    if (folder / "trace.json").exists():
        print(f"trace       {folder / 'trace.json'}, for ui.perfetto.dev or chrome://tracing; its costs in costs.json")


def verify(config: VerifyConfig, overrides: list[str]) -> int:
    """Compare layouts. Returns the exit code."""
    config = finish(config)
    with ExitStack() as claims:
        backends = select_backends(config.kernels.backend, config.train.device, config.train.dtype)
        config = rundir.create(config, overrides, backends, claims)
        import megapar.verify

        return megapar.verify.run(config)


def data(config: PrepareConfig) -> int:
    """Make or check token files and print what they hold. Returns the exit code."""
    from megapar.config.keys import check_values
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


def kernels(config: InspectConfig) -> int:
    """Compile kernels for GPUs that need not be here and print what the machine code shows. Returns the exit code."""
    import json
    from dataclasses import asdict

    from megapar.inspect.compile import TARGETS, choose, compile_all, specs_of
    from megapar.inspect.table import table
    from megapar.kernels import has_triton
    from megapar.kernels.registry import compiled

    chosen, targets = choose("kernel", config.kernel, compiled()), choose("targets", config.targets, TARGETS)
    refuse_bad_out(config.specs, None, "specs")
    refuse_bad_out(config.out, None)
    if not has_triton():
        raise UserError("kernels: Triton is not installed, and it is the compiler; install it: pip install triton")
    specs = specs_of(chosen, targets)
    if config.specs is not None:
        entries = [spec.batch_entry() for spec in specs if spec.target.startswith("sm_")]
        Path(config.specs).write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
        say(f"{config.specs}: {len(entries)} kernels, nothing compiled")
        return 0
    say(f"compiling {len(specs)} kernels; Triton's cache keeps them")
    figures = compile_all(specs)
    print(table(figures))
    if config.out is not None:
        lines = ",\n".join(json.dumps(asdict(one)) for one in figures)
        Path(config.out).write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    return 1 if any(one.error for one in figures) else 0


def bench_kernels(config: BenchKernelsConfig) -> int:
    """Time kernels, write the rows, tables and plots, and print the tables. Returns the exit code."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler counts memory and would talk about it
    from megapar.bench import plots, rows, run, tables

    bench = run.understand(config, num_gpus(), say)
    out = Path(config.out) if config.out is not None else rundir.default_folder("bench", key="out")
    rundir.make_writable(out, key="out")
    drawn = plots.names(run.benches())
    for name in ("bench.csv", "bench.md", *drawn):  # what this run does not draw would be another's
        (out / name).unlink(missing_ok=True)
    found: list[rows.Row] = []
    try:
        for row in run.run(bench, say):
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


def bench_overlap(config: BenchOverlapConfig) -> int:
    """Time overlapped communication, write rows, tables and pictures, print the tables. Returns the exit code."""
    from megapar.bench import overlap, rows
    from megapar.report.pieces import draw_walks

    overlap.check(config)
    out = Path(config.out) if config.out is not None else rundir.default_folder("bench", key="out")
    rundir.make_writable(out, key="out")
    found = overlap.run(config, say)
    rows.write(found.rows, out / "bench.csv")
    for rate, walks in found.walks.items():
        where = f"{rate:g} Gbit/s" if rate else "not paced"
        picture = draw_walks(f"A tensor-parallel MLP, forward and backward, {where}", walks)
        (out / f"layer_{rate:g}.svg").write_text(picture, encoding="utf-8")
    tables = overlap.tables(found.rows)
    (out / "bench.md").write_text("\n\n".join(table.markdown() for table in tables) + "\n", encoding="utf-8")
    print("\n\n".join(table.text() for table in tables))
    say(f"{out}: bench.csv, bench.md" + (f", {len(found.walks)} pictures" if found.walks else ""))
    return 0


def schedule(config: ScheduleConfig) -> int:
    """Compare pipeline schedules by simulation; write or draw the chosen one. Returns the exit code."""
    import json

    from megapar.report.schedules import compare, draw
    from megapar.schedule.table import write

    for key in ("csv", "plot"):
        path = getattr(config, key)
        refuse_bad_out(path, None, key)
        if path is not None and config.pipeline.schedule == "all":
            raise ConfigError(key, path, "is for one schedule; name it: pipeline.schedule=NAME")
    if config.plot is not None and not config.plot.endswith((".svg", ".html")):
        raise ConfigError("plot", config.plot, "draws .svg or .html; name a file that ends so")
    refuse_bad_out(config.out, None)
    comparison = compare(config)
    if config.csv is not None:
        write(comparison.candidates[0].schedule, config.csv)
    if config.plot is not None:
        Path(config.plot).write_text(draw(config, comparison.candidates[0]), encoding="utf-8")
    if config.out is not None:
        rows = [found.row() for found in comparison.candidates]
        Path(config.out).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print(comparison.text())
    return 0
