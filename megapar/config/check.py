"""Refusals before anything starts: values out of range, layouts that do not divide the model, absent hardware.

Pure functions of a config (and of facts about the machine and the data passed as arguments). Each raises ConfigError,
one line with the key, its value and the remedy.
"""

from fnmatch import fnmatchcase
from functools import cache
from math import prod
from typing import Any, TypeVar

from megapar.config.check_model import check_model, divisors
from megapar.config.errors import ConfigError
from megapar.config.faults import faults
from megapar.config.keys import changed, check_values
from megapar.config.layout import AXES, Layout, layouts_up_to
from megapar.config.model import parts
from megapar.config.run_schema import ChatConfig, ForwardConfig, GenerateConfig, WriterConfig
from megapar.config.schema import ModelConfig, TrainConfig, VerifyConfig
from megapar.config.sites import sites_of
from megapar.config.stacks import media, medium, stacks
from megapar.config.stages import make_schedule, num_microbatches, num_stages, part_costs, stage_parts
from megapar.config.tasks import check_task
from megapar.kernels import INTERPRET, NEEDS_TRITON, select_backends
from megapar.schedule.actions import ScheduleError
from megapar.schedule.build import CSV, build, generators, refusal, refuse_chunks, refuse_unknown, table_ranks
from megapar.schedule.check import check as check_table
from megapar.update_rules import optimizer_names

T = TypeVar("T", TrainConfig, VerifyConfig)
MOST_PASSES = 100_000  # micro-batches of a rank in a step: a schedule of more takes minutes to make


def check(config: TrainConfig, *, num_gpus: int = 0, world_size: int | None = None, task: bool = True) -> None:
    """Refuse what can't work in a resolved config.

    num_gpus: GPUs visible here; world_size: ranks that something else has already started, None if we start them
    task: whether the model is to learn the config's task
    """
    check_values(config)
    check_model(config.model)
    # verify takes its layouts from elsewhere, and its list of layers per stage is for those.
    check_layout(with_layout(config, config.parallel.layout) if isinstance(config, VerifyConfig) else config)
    check_training(config)
    if task:
        check_task(config)
    check_machine(config, num_gpus=num_gpus, world_size=world_size)
    faults(config.fault.plan, None if config.run.elastic else config.parallel.layout.world)
    if isinstance(config, VerifyConfig):
        check_verify(config, num_gpus=num_gpus)


def check_layout(config: TrainConfig) -> None:
    """Refuse a layout that does not divide the model, the stages or the batch."""
    for name, kind in AXES.items():
        if kind.splits == "tokens" and config.parallel.layout[name] > 1:
            problem = "no layer and no task splits tokens over this axis yet; use 1 (docs/howto/add-an-axis.md)"
            raise ConfigError(f"parallel.{name}", config.parallel.layout[name], problem)
    check_tensor_parallel(config.model, config.parallel.tp)
    if (tp := config.parallel.encoder.tp) not in (None, config.parallel.tp):
        problem = f"all stacks have one width, parallel.tp={config.parallel.tp}"
        if config.model.encoder.layers:
            problem += ": a decoder layer reads keys and values of its own heads from the memory"
        raise ConfigError("parallel.encoder.tp", tp, f"{problem}; leave it out")
    check_pipeline(config)
    train, parallel, layout = config.train, config.parallel, config.parallel.layout
    lengths = {"seq_length": train.seq_length, "source_length": train.source_length or 0}
    for name, length in lengths.items() if parallel.sequence_parallel else ():
        if (tokens := train.micro_batch_size * length) % parallel.tp:
            product = f"train.micro_batch_size * {name} = {tokens}"
            problem = f"{product} is not divisible by parallel.tp={parallel.tp}; turn it off"
            raise ConfigError("parallel.sequence_parallel", True, problem)
    split = {f"parallel.{name}": layout[name] for name, kind in AXES.items() if kind.splits == "samples"}
    factors, batch = {"train.micro_batch_size": train.micro_batch_size} | split, train.global_batch_size
    step = prod(factors.values())
    if batch % step:
        product = f"{' * '.join(factors)} = {' * '.join(map(str, factors.values()))} = {step}"
        raise ConfigError("train.global_batch_size", batch, f"not a multiple of {product}; use {_near(batch, step)}")
    if (passes := num_microbatches(config)) > MOST_PASSES:
        problem = f"{passes:,} micro-batches on each rank in one step, more than {MOST_PASSES:,}"
        raise ConfigError("train.global_batch_size", batch, f"{problem}; raise train.micro_batch_size, or lower it")
    if parallel.grad_compression != "none":
        if train.dtype == "fp64":
            problem = "compresses fp32 main gradients, and train.dtype=fp64 has others; use none, or another dtype"
            raise ConfigError("parallel.grad_compression", parallel.grad_compression, problem)
        if parallel.powersgd_rank < 1:
            raise ConfigError("parallel.powersgd_rank", parallel.powersgd_rank, "use 1 or more")
    check_schedule(config)
    stage_parts(config)


_CUT = ("heads", "ffn")  # sizes of a stack that tp divides


def check_tensor_parallel(model: ModelConfig, tp: int) -> None:
    """Refuse a tp that does not divide the model. A vocabulary need not divide: its shards differ by a row."""
    media_sizes = {f"{name}.{key}": getattr(medium(model, name), key) for name in media(model) for key in _CUT}
    for key, size in ({key: getattr(model, key) for key in _CUT} | media_sizes).items():
        if size is not None and size % tp:
            problem = f"not divisible by parallel.tp={tp}; use {_near(size, tp)}, or another tp"
            raise ConfigError(f"model.{key}", size, problem)
    if media_sizes and model.hidden % tp:
        problem = f"projectors of media are cut by it, and it is not divisible by parallel.tp={tp}"
        raise ConfigError("model.hidden", model.hidden, f"{problem}; use {_near(model.hidden, tp)}, or another tp")
    kv_heads = model.kv_heads
    if kv_heads is not None and kv_heads % tp and tp % kv_heads:
        problem = f"neither divides parallel.tp={tp} nor is a multiple of it; use a tp of {divisors(kv_heads)}"
        raise ConfigError("model.kv_heads", kv_heads, problem)
    if model.vocab_size is not None and model.vocab_size < tp:
        raise ConfigError("model.vocab_size", model.vocab_size, f"smaller than parallel.tp={tp}; use at least {tp}")


def check_pipeline(config: TrainConfig) -> None:
    """Refuse stages without layers and partitions that do not add up."""
    layers, pp, partition = config.model.all_layers, config.parallel.pp, config.pipeline.partition
    chunks, one_stack = config.pipeline.chunks or 1, len(stacks(config.model)) == 1
    if why := refuse_chunks(config.pipeline.schedule, chunks):
        raise ConfigError("pipeline.chunks", chunks, why)
    stages = num_stages(config)
    most = layers if partition == "uniform" else len(parts(config))
    if stages > most:
        there = f"model.layers={layers}" if one_stack else f"the {layers} layers of the model"
        problem = f"more stages than {there}; use at most {layers // chunks}"
        if chunks > layers:
            problem = f"with pipeline.chunks={chunks} more stages than {there}; use fewer chunks"
        elif chunks > 1:
            problem = f"with pipeline.chunks={chunks} {problem}, or fewer chunks"
        raise ConfigError("parallel.pp", pp, problem)
    check_devices(config)
    if not one_stack:
        for key, none in (("costs", None), ("rebalance", 0)):
            if (value := getattr(config.pipeline, key)) != none:
                problem = "measured times are of layers that are alike; with an encoder use pipeline.partition=balanced"
                raise ConfigError(f"pipeline.{key}", value, problem)
    if config.pipeline.costs is not None:
        part_costs(config)
    if isinstance(partition, str):
        if partition not in ("uniform", "balanced"):
            problem = "use uniform, balanced, or the layers of each stage such as [5,3]"
            raise ConfigError("pipeline.partition", partition, problem)
        return
    assert not isinstance(partition, dict), "resolve the configuration first"
    if len(partition) != stages:
        product = f"parallel.pp={pp}" if chunks == 1 else f"parallel.pp * pipeline.chunks = {pp} * {chunks}"
        raise ConfigError(
            "pipeline.partition", partition, f"needs {stages} numbers, one per stage ({product}); or uniform"
        )
    if min(partition) < 0 or 0 in partition[1:-1] or sum(partition) != layers:
        total = f"model.layers={layers}" if one_stack else f"the model's {layers} layers"
        problem = f"must be {stages} numbers that add up to {total}; only the ends may be 0; or uniform"
        raise ConfigError("pipeline.partition", partition, problem)


def check_devices(config: TrainConfig) -> None:
    """Refuse figures of devices that are not one per pipeline rank, and keys without effect."""
    pipeline, pp = config.pipeline, config.parallel.pp
    balanced, auto = pipeline.partition == "balanced", pipeline.schedule == "auto"
    for name, used, goes_with in (
        ("speed", balanced or auto, "pipeline.partition=balanced, or pipeline.schedule=auto"),
        ("device_memory", balanced, "pipeline.partition=balanced"),
        ("memory_limit", auto, "pipeline.schedule=auto"),
    ):
        key, value = f"pipeline.{name}", getattr(pipeline, name)
        if value is None or pp == 1:
            continue
        if not used:
            raise ConfigError(key, value, f"has no effect here; it is used only with {goes_with}")
        if isinstance(value, list) and len(value) != pp:
            raise ConfigError(key, value, f"needs {pp} numbers, one per pipeline rank")
        if isinstance(value, list) and min(value) <= 0:
            raise ConfigError(key, value, "must be more than 0")


def check_schedule_name(key: str, name: str) -> None:
    """Refuse a name that is no schedule's."""
    try:
        refuse_unknown(name)
    except ScheduleError as error:
        raise ConfigError(key, name, str(error)) from None


def check_schedule(config: TrainConfig) -> None:
    """Refuse a schedule that can't be had for the layout's ranks and micro-batches, and a table that can't run."""
    name, ranks, chunks = config.pipeline.schedule, config.parallel.pp, config.pipeline.chunks or 1
    if ranks == 1:
        return
    microbatches = num_microbatches(config)
    try:
        why = refusal(name, ranks, microbatches, chunks)
        if why is None:
            _prove(name, ranks, microbatches, chunks)
        if not name.startswith(CSV) and generators()[name].searches and config.pipeline.memory_limit is not None:
            make_schedule(config)
    except ScheduleError as error:
        why = str(error)
    if why:
        raise ConfigError("pipeline.schedule", name, why)


@cache
def _prove(name: str, ranks: int, microbatches: int, chunks: int) -> None:
    """Raise ScheduleError if a schedule can't be a training step. For stages that are all alike: costs decide an order,
    and each rank proves its own."""
    if name.startswith(CSV) or not generators()[name].searches:
        check_table(build(name, ranks, microbatches, chunks=chunks), training=True)


def check_training(config: TrainConfig) -> None:
    """Refuse contradictions of the loop, the optimizer and the data."""
    train = config.train
    check_optimizer(config)
    sites_of(config.interpret.capture or [], config.model, "interpret.capture")
    if config.checkpoint.load is not None and config.checkpoint.weights is not None:
        problem = "checkpoint.load takes all of a run's state, its weights too; give one of them"
        raise ConfigError("checkpoint.weights", config.checkpoint.weights, problem)
    trace = train.trace
    if trace is not None and (len(trace) != 2 or not 1 <= trace[0] <= trace[1] <= train.steps):
        problem = f"needs the first and the last step to trace, within 1 to train.steps={train.steps}, such as "
        raise ConfigError("train.trace", trace, problem + f"[{max(1, train.steps - 1)},{train.steps}]")
    if train.eval_every and not config.data.split:
        raise ConfigError(
            "train.eval_every", train.eval_every, "data.split=0 holds nothing out; raise it or use eval_every=0"
        )
    project = config.logger.wandb.project
    if not 0 < len(project) <= 128 or set(project) & set("/\\#?%:"):
        raise ConfigError("logger.wandb.project", project, "a project's name has 1 to 128 characters, none of /\\#?%:")


def check_optimizer(config: TrainConfig) -> None:
    """Refuse an unknown rule, a schedule longer than the run, and groups of parts that are not there."""
    optim, steps = config.optim, config.train.steps
    check_optimizer_name(optim.name)
    if optim.warmup_steps > steps:
        raise ConfigError("optim.warmup_steps", optim.warmup_steps, f"more than train.steps={steps}; use at most that")
    if optim.decay_steps is not None and optim.schedule != "wsd":
        raise ConfigError("optim.decay_steps", optim.decay_steps, "has no effect here; use it with optim.schedule=wsd")
    if optim.decay_steps is not None and optim.decay_steps + optim.warmup_steps > steps:
        problem = f"more than the {steps - optim.warmup_steps} steps behind the warm-up; use at most that"
        raise ConfigError("optim.decay_steps", optim.decay_steps, problem)
    for pattern in optim.groups or {}:
        if not any(fnmatchcase(part.name, pattern) for part in parts(config)):
            names = [part.name for part in parts(config)]
            there = f"{names[0]}, {names[1]} to {names[-2]}, {names[-1]}; or a pattern such as layers.*"
            raise ConfigError("optim.groups", pattern, f"matches no part of the model; there are {there}")


def check_optimizer_name(name: str) -> None:
    """Refuse a name that is no update rule's."""
    if name not in optimizer_names():
        raise ConfigError("optim.name", name, f"no such update rule; there are {', '.join(optimizer_names())}")


def check_machine(config: TrainConfig, *, num_gpus: int, world_size: int | None) -> None:
    """Refuse what the hardware or the number of started ranks does not allow."""
    check_backend(config.kernels.backend, config.train.device, config.train.dtype)
    backends = select_backends(config.kernels.backend, config.train.device, config.train.dtype)
    if config.parallel.tp_overlap == "symmetric" and backends["matmul"] == "torch":
        raise ConfigError("parallel.tp_overlap", "symmetric", NEEDS_TRITON)
    if config.parallel.tp_overlap == "symmetric" and (config.train.device, backends["matmul"]) == ("cuda", "interpret"):
        problem = f"{INTERPRET} is set, and Triton's interpreter can't reach a GPU's memory; unset it"
        raise ConfigError("parallel.tp_overlap", "symmetric", problem)
    if isinstance(config, VerifyConfig):
        return
    layout = config.parallel.layout
    check_ranks(layout, config.train.device, "train.device", num_gpus=num_gpus, world_size=world_size)
    if config.devices is not None and config.devices != layout.world:
        problem = f"the layout {layout} has {layout.world} ranks; leave it out, or use parallel=auto"
        raise ConfigError("devices", config.devices, problem)


def check_ranks(layout: Layout, device: str, key: str, *, num_gpus: int, world_size: int | None) -> None:
    """Refuse a layout of another size than the ranks or GPUs that are there. `key` names the device's key."""
    if world_size is not None and layout.world != world_size:
        problem = (
            f"{'*'.join(layout)} = {'*'.join(map(str, layout.sizes))} = {layout.world}, "
            f"but {world_size} ranks were started"
        )
        raise ConfigError("parallel", layout, f"{problem}; start {layout.world}, or choose a layout of {world_size}")
    if device == "cuda" and num_gpus == 0:
        raise ConfigError(key, device, "no GPU is visible; use cpu")
    if device == "cuda" and world_size is None and layout.world > num_gpus:
        problem = f"needs {layout.world} GPUs, {num_gpus} visible; use {key}=cpu or a smaller layout"
        raise ConfigError("parallel", layout, problem)


def check_backend(backend: str, device: str, dtype: str) -> None:
    """Refuse a kernel backend that can't run on a resolved device and in this dtype."""
    try:
        select_backends(backend, device, dtype)
    except ValueError as error:
        raise ConfigError("kernels.backend", backend, str(error)) from None


def check_verify(config: VerifyConfig, *, num_gpus: int) -> None:
    """Refuse layouts that the config or the machine can't take, and a dtype that the bounds are not made for."""
    check_ranks(Layout(), config.train.device, "train.device", num_gpus=num_gpus, world_size=None)
    if config.train.dtype == "bf16":
        raise ConfigError("train.dtype", "bf16", "verify compares in fp64 or fp32; use one of them")
    problem = "verify starts every layout from its initial values; leave it out"
    if config.checkpoint.load is not None:
        raise ConfigError("checkpoint.load", config.checkpoint.load, problem)
    if config.checkpoint.weights is not None:
        raise ConfigError("checkpoint.weights", config.checkpoint.weights, problem)
    if config.pipeline.rebalance:
        raise ConfigError("pipeline.rebalance", config.pipeline.rebalance, "verify moves no layers; leave it out")
    if config.layouts is not None and not config.layouts:
        raise ConfigError("layouts", [], "nothing to compare; name layouts such as [tp2,pp2], or leave it out for all")
    for name in config.layouts or []:
        refusal = why_not(config, Layout.parse(name))
        if refusal:
            raise ConfigError("layouts", name, str(refusal))
        if config.train.device == "cuda" and Layout.parse(name).world > num_gpus:
            problem = (
                f"needs {Layout.parse(name).world} GPUs, {num_gpus} visible; use train.device=cpu, or leave it out"
            )
            raise ConfigError("layouts", name, problem)
    layouts = [with_layout(config, Layout.parse(name)) for name in config.layouts or []]
    if (ranks := table_ranks(config.pipeline.schedule)) not in (None, *(layout.parallel.pp for layout in layouts)):
        problem = f"the table has {ranks} rows; name a layout with pp{ranks} in layouts"
        raise ConfigError("pipeline.schedule", config.pipeline.schedule, problem)
    partition, stages = config.pipeline.partition, {num_stages(layout) for layout in layouts}
    if isinstance(partition, list) and len(partition) not in stages:
        problem = f"no layout with {len(partition)} stages takes it; name one in layouts, or use uniform"
        raise ConfigError("pipeline.partition", partition, problem)


def check_plan(config: TrainConfig, rank: int) -> None:
    """Refuse what a layout of this model can't be, whatever machine it is for, and a rank that it has not."""
    check_values(config)
    check_model(config.model)
    check_layout(config)
    check_training(config)
    world = config.parallel.layout.world
    if config.devices not in (None, world):
        raise ConfigError("devices", config.devices, f"the layout {config.parallel.layout} has {world} ranks")
    if rank >= world:
        raise ConfigError("rank", rank, f"{config.parallel.layout} has ranks 0 to {world - 1}")


def check_forward(
    config: ForwardConfig, trained: TrainConfig, *, num_gpus: int = 0, world_size: int | None = None
) -> None:
    """Refuse a layout that the trained model does not divide into, absent hardware, and what can't be written."""
    check_values(config)
    check_backend(config.kernels.backend, config.device, config.dtype)
    if config.parallel.pp > trained.model.all_layers:
        problem = f"more stages than the {trained.model.all_layers} layers of this run's model; use at most that"
        raise ConfigError("parallel.pp", config.parallel.pp, problem)
    check_tensor_parallel(trained.model, config.parallel.tp)
    if isinstance(config, WriterConfig):
        check_writer(config, trained.model)
    check_ranks(config.parallel.layout, config.device, "device", num_gpus=num_gpus, world_size=world_size)


def check_writer(config: WriterConfig, model: ModelConfig) -> None:
    """Refuse a model that writes no text, and nothing to continue."""
    if not model.causal or model.output != "lm":
        what = f"model.causal={str(model.causal).lower()} model.output={model.output}"
        raise ConfigError("run.dir", config.run.dir, f"its model ({what}) writes no text; name a run of a decoder")
    if isinstance(config, ChatConfig) and model.encoder.layers:
        problem = "its model reads each source anew and holds no conversation; use generate or serve"
        raise ConfigError("run.dir", config.run.dir, problem)
    if config.parallel.sequence_parallel:
        problem = "a text is written a token at a time, so there is nothing to split; leave it out"
        raise ConfigError("parallel.sequence_parallel", True, problem)
    if isinstance(config, GenerateConfig):
        if config.prompt_file is not None and config.prompt:
            raise ConfigError("prompt", config.prompt, f"{config.prompt_file} has prompts, too; give one of them")
        for name, files in (("image", config.image), ("audio", config.audio)):
            if files and not medium(model, name).layers:
                raise ConfigError(name, files[0], f"this run's model has no encoder of it (model.{name}.layers)")
            if files and (config.chat or config.prompt_file is not None):
                raise ConfigError(name, files[0], "goes with one prompt=TEXT; leave out chat and prompt_file")
        if config.prompt_file is None and not (config.prompt or config.image or config.audio):
            raise ConfigError("prompt", '""', "there is nothing to continue; give some text: prompt=TEXT")


def with_layout(config: T, layout: Layout) -> T:
    """The same config in another layout, without what is for another number of pipeline ranks.

    A table becomes 1F1B, a partition uniform, speeds and memory of devices are left out.
    """
    values: dict[str, Any] = {f"parallel.{axis}": size for axis, size in layout.items()}
    for key in ("speed", "device_memory"):
        if len(getattr(config.pipeline, key) or ()) != layout["pp"]:
            values[f"pipeline.{key}"] = None
    if table_ranks(config.pipeline.schedule) not in (None, layout["pp"]):
        config = changed(config, {"pipeline.schedule": "1f1b", "pipeline.chunks": 1})
    partition = config.pipeline.partition
    config = changed(config, values | {"parallel.auto": False})
    if isinstance(partition, list) and len(partition) != num_stages(config):
        return changed(config, {"pipeline.partition": "uniform"})
    return config


def why_not(config: TrainConfig, layout: Layout) -> ConfigError | None:
    """Why a resolved config can't run in a layout, None if it can."""
    try:
        check_layout(with_layout(config, layout))
    except ConfigError as refusal:
        return refusal
    return None


def feasible_layouts(config: TrainConfig, ranks: int = 8) -> list[Layout]:
    """Every layout of 2 to `ranks` ranks that divides the config."""
    return [layout for layout in layouts_up_to(ranks) if why_not(config, layout) is None]


def _near(value: int, step: int) -> str:
    below, above = value // step * step, (value // step + 1) * step
    return f"{below} or {above}" if below else str(above)
