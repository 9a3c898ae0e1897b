"""What a config leaves open: sizes derived from other sizes, the vocabulary, the layout, the device."""

import os
from collections.abc import Mapping
from math import prod
from types import MappingProxyType
from typing import Any, TypeVar

from megapar.config.check import (
    T,
    check_schedule_name,
    feasible_layouts,
    why_not,
    with_layout,
)
from megapar.config.errors import ConfigError
from megapar.config.keys import changed, check_values
from megapar.config.layout import AXES, Layout, layouts_of
from megapar.config.run_schema import ForwardConfig
from megapar.config.schema import ModelConfig, PipelineConfig, TrainConfig, VerifyConfig
from megapar.config.stacks import STACKS, medium, prefix, stack_layers, stacks
from megapar.config.stacks import media as media_of
from megapar.config.stages import make_schedule, stage_costs
from megapar.schedule.actions import ScheduleError
from megapar.schedule.build import CSV, default_chunks, table_ranks
from megapar.schedule.simulate import simulate

C = TypeVar("C", bound=TrainConfig | ForwardConfig)
F = TypeVar("F", bound=ForwardConfig)
MOST_TRIED = 1000  # numbers of ranks, for the one that is named where none fits


def resolve(
    config: T,
    *,
    vocab_size: int | None = None,
    max_token: int | None = None,
    classes: int | None = None,
    media: Mapping[str, int] | None = None,
    num_gpus: int = 0,
    world_size: int | None = None,
    slots: int | None = None,
) -> T:
    """`config` with every derived None filled in; resolving a resolved config changes nothing.

    vocab_size: the tokenizer's; None where it is unknown, as for token files made elsewhere
    max_token: largest token id in the data; None before the data was read (model.vocab_size may then stay None)
    classes: of the data; None where they have no labels
    media: tokens per sample that encoders of media read, about, by stack; None where that is unknown
    num_gpus: GPUs visible on this machine
    world_size: ranks that torchrun or srun has started; None if we start them
    slots: ranks that may run, of an elastic run; None: as many as there are GPUs, or as the layout has

    Raises ConfigError where nothing can be derived. Call `check` afterwards.
    """
    check_values(config)
    sizes = model_sizes(config.model) | _vocabulary(config.model, vocab_size, max_token)
    sizes |= _classes(config.model, classes, config.data.path)
    config = changed(config, {f"model.{name}": size for name, size in sizes.items()})
    config = changed(config, {f"pipeline.{name}": value for name, value in _schedule(config.pipeline).items()})
    config = changed(config, _of_stacks(config, media or {}))
    if config.train.trace is None:
        config = changed(config, {"train.trace": [config.train.steps] * 2})
    if isinstance(config, VerifyConfig):
        if config.train.device == "auto":
            config = changed(config, {"train.device": "cpu"})
        if config.parallel.auto:
            raise ConfigError("parallel.auto", True, "verify runs many layouts; name them: layouts=[tp2,pp2dp2]")
        config = for_device(_derive_sizes(config, 1))
        if config.layouts is None:
            config = changed(config, {"layouts": [str(layout) for layout in _layouts_to_verify(config, num_gpus)]})
        return config
    if config.train.device == "auto":
        config = changed(config, {"train.device": _device(config.kernels.backend, num_gpus)})
    config = for_device(config)
    gpus = num_gpus if config.train.device == "cuda" else 0
    ranks = world_size or config.devices or gpus or 1
    if config.parallel.auto:
        config = with_layout(config, _auto(config, ranks))
    config = _derive_sizes(config, ranks)
    if config.run.elastic and world_size is None:
        there = (gpus or config.parallel.layout.world) if slots is None else slots
        return for_ranks(changed(config, {"devices": None}), there)
    return config


def for_ranks(config: TrainConfig, slots: int) -> TrainConfig:
    """A resolved config for at most `slots` ranks. Samples and global batch stay. Raises ConfigError where no rank may
    run.

    Its own layout if that fits; else of those that hold no more of the model on a rank (if there is none: as little
    more as can be), and whose tp is no wider, the one whose step the simulator finds shortest, and of equals the most
    alike. Where the pipeline gets another length, a list of layers gives way to what the partitioner finds.
    """
    wanted = config.parallel.layout
    if slots < 1:
        raise ConfigError("run.slots_file", config.run.slots_file, f"leaves {slots} ranks; give 1 or more")
    if wanted.world <= slots:
        return config

    def changed_to(layout: Layout) -> TrainConfig:
        partition = config.pipeline.partition
        given = "balanced" if isinstance(partition, list) and layout["pp"] != wanted["pp"] else partition
        return with_layout(changed(config, {"pipeline.partition": given}), layout)

    def seconds(there: TrainConfig) -> float:
        """In units of the costs; three digits of it, as they are estimates."""
        time = simulate(make_schedule(there), stage_costs(there)).step_time
        return float(f"{time / there.parallel.tp:.3g}")

    least = seconds(changed_to(Layout()))
    best: tuple[Any, TrainConfig] | None = None
    for ranks in range(slots, 0, -1):
        divided = min(ranks, _model_parts(wanted))
        if best is not None and (divided, -least / ranks) < best[0]:
            break  # however well fewer ranks went together
        for layout in layouts_of(ranks):
            if layout["tp"] > wanted["tp"] or why_not(config, layout) is not None:
                continue
            there = changed_to(layout)
            alike = tuple(layout[name] == wanted[name] for name in ("tp", "pp", "dp"))
            worth = min(_model_parts(layout), _model_parts(wanted)), -seconds(there), alike
            if best is None or worth > best[0]:
                best = worth, there
    if best is None:
        raise ConfigError("run.elastic", True, f"no layout of {slots} ranks or fewer divides this model and batch")
    return best[1]


def _model_parts(layout: Layout) -> int:
    """Among how many ranks a copy of the model is divided."""
    return prod(size for name, size in layout.items() if AXES[name].splits not in ("samples", "tokens", None))


def in_one_process(config: T, num_gpus: int = 0) -> T:
    """A config as one process would have it, as far as its sizes need: cheap to make, whatever the model's size."""
    check_values(config)
    values: dict[str, Any] = {f"parallel.{axis}": 1 for axis in AXES} | {"parallel.auto": False}
    values |= {f"model.{name}": size for name, size in model_sizes(config.model).items()} | _of_stacks(config)
    if config.train.device == "auto":
        on_cpu = isinstance(config, VerifyConfig)
        values["train.device"] = "cpu" if on_cpu else _device(config.kernels.backend, num_gpus)
    return changed(config, values)


def resolve_forward(config: F, *, num_gpus: int = 0, world_size: int | None = None) -> F:
    """The same for forwards alone. One replica is enough, so dp is 1 where it is left out; `parallel=auto` takes tp, as
    the answer comes sooner."""
    check_values(config)
    if config.device == "auto":
        config = changed(config, {"device": _device(config.kernels.backend, num_gpus)})
    if config.parallel.auto:
        gpus = num_gpus if config.device == "cuda" else 0
        config = changed(config, {"parallel.auto": False, "parallel.tp": world_size or config.devices or gpus or 1})
    return _derive_sizes(config, 1)


def _layouts_to_verify(config: VerifyConfig, num_gpus: int) -> list[Layout]:
    """Every feasible one of up to 8 ranks. On GPUs of no more than there are, and one rank first: the reference is the
    CPU's there."""
    if config.train.device == "cpu":
        return feasible_layouts(config)
    return [Layout(), *feasible_layouts(config, min(8, num_gpus))]


def _device(backend: str, num_gpus: int) -> str:
    """What device=auto is: a GPU if one is visible, but kernels are interpreted on a CPU."""
    return "cuda" if num_gpus and backend != "interpret" else "cpu"


# NCCL counts the time of a receive from when it is posted, ahead of the phase that it may wait for; gloo from its wait.
# A bucket of 1M is a collective of 4 MB, a third of what NVLink can do, and 60 us of Python: too small for a GPU.
_DEFAULTS = {
    "cpu": {"parallel.bucket_size": 1_000_000, "train.timeout_s": 300.0},
    "cuda": {"parallel.bucket_size": 40_000_000, "train.timeout_s": 1800.0},
}


def for_device(config: T) -> T:
    """With what is left open and depends on the device."""
    given = {"parallel.bucket_size": config.parallel.bucket_size, "train.timeout_s": config.train.timeout_s}
    defaults: dict[str, Any] = dict(_DEFAULTS[config.train.device])
    if isinstance(config, VerifyConfig) and config.train.device == "cpu":
        defaults["train.timeout_s"] = 60.0  # its models are small
    return changed(config, {key: value for key, value in defaults.items() if given[key] is None})


def model_sizes(model: ModelConfig) -> dict[str, Any]:
    if model.head_dim is None and model.hidden % model.heads:
        problem = f"not divisible by model.heads={model.heads}; change one, or set model.head_dim"
        raise ConfigError("model.hidden", model.hidden, problem)
    return {
        "kv_heads": model.kv_heads or model.heads,
        "head_dim": model.head_dim or model.hidden // model.heads,
        "ffn": model.ffn or _inner(model, model.hidden),
        **{f"{name}.{key}": size for name in media_of(model) for key, size in _medium_sizes(model, name).items()},
    }


def _inner(model: ModelConfig, hidden: int) -> int:
    # 8/3 gives the gated MLP's three matrices as many weights as 4 gives the plain one's two; 32 keeps tp free.
    return -(-8 * hidden // (3 * 32)) * 32 if model.gated else 4 * hidden


def _medium_sizes(model: ModelConfig, name: str) -> dict[str, int]:
    """Of an encoder of images or sound."""
    own = medium(model, name)
    hidden, heads = own.hidden or model.hidden, own.heads or model.heads
    if hidden % heads:
        raise ConfigError(f"model.{name}.hidden", hidden, f"not divisible by model.{name}.heads={heads}; change one")
    return {"hidden": hidden, "heads": heads, "ffn": own.ffn or _inner(model, hidden)}


def _schedule(pipeline: PipelineConfig) -> dict[str, Any]:
    """Paths that hold from anywhere, and the schedule's own number of stages per rank."""
    name = pipeline.schedule
    check_schedule_name("pipeline.schedule", name)
    if name.startswith(CSV):
        name = CSV + os.path.abspath(os.path.expanduser(name.removeprefix(CSV)))
    try:
        costs = os.path.abspath(pipeline.costs) if pipeline.costs else None
        return {"schedule": name, "chunks": pipeline.chunks or default_chunks(name), "costs": costs}
    except ScheduleError as error:
        raise ConfigError("pipeline.schedule", pipeline.schedule, str(error)) from None


def _vocabulary(model: ModelConfig, vocab_size: int | None, max_token: int | None) -> dict[str, Any]:
    if model.vocab_size is None:
        if vocab_size is None and max_token is not None:
            problem = (
                f"these token files do not say it; their largest token is {max_token}, so use at least {max_token + 1}"
            )
            raise ConfigError("model.vocab_size", None, problem)
        return {"vocab_size": vocab_size}
    if vocab_size is not None and model.vocab_size < vocab_size:
        problem = f"smaller than the tokenizer's {vocab_size}; use at least that, or leave it out"
        raise ConfigError("model.vocab_size", model.vocab_size, problem)
    if max_token is not None and model.vocab_size <= max_token:
        problem = f"the data holds token {max_token}; use at least {max_token + 1}"
        raise ConfigError("model.vocab_size", model.vocab_size, problem)
    return {}


def _classes(model: ModelConfig, classes: int | None, path: str) -> dict[str, Any]:
    if model.output != "classes" or classes is None:
        return {}
    if classes == 1:
        raise ConfigError("data.path", path, "all of it has one label; a classifier needs two labels or more")
    if model.classes is not None and model.classes < classes:
        raise ConfigError("model.classes", model.classes, f"the data have {classes} labels; use at least that")
    return {"classes": model.classes or classes}


def _of_stacks(config: TrainConfig, of_media: Mapping[str, int] = MappingProxyType({})) -> dict[str, Any]:
    """Tokens that encoders read, and a partition of all stacks as one. of_media: tokens of media, where they are known;
    else as many as a sample has."""
    model, train, partition = config.model, config.train, config.pipeline.partition
    there = stacks(model)
    values: dict[str, Any] = {}
    for name in STACKS[1:]:
        key = "source_length" if name == "encoder" else f"{name}_length"
        length = getattr(train, key)
        if name in there:
            values[f"train.{key}"] = of_media.get(name, train.seq_length) if length is None else length
        elif length is not None:
            raise ConfigError(f"train.{key}", length, f"the model has no {name}.layers to read it; leave it out")
    if not isinstance(partition, dict):
        return values
    layers = {name or ("decoder" if "encoder" in there else "trunk"): name for name in there}
    if set(partition) != set(layers):
        forms = ", ".join(f"{name}: [...]" for name in layers)
        problem = f"use {{{forms}}} for this model" if len(layers) > 1 else "use a list, as the model has one stack"
        raise ConfigError("pipeline.partition", partition, problem)
    for name, stack in layers.items():
        key, count = f"model.{prefix(stack)}layers", stack_layers(model, stack)
        if sum(partition[name]) != count or min(partition[name], default=0) < 1:
            problem = f"those of the {name} must add up to {key}={count}, each at least 1"
            raise ConfigError("pipeline.partition", partition, problem)
    return values | {"pipeline.partition": [count for name in layers for count in partition[name]]}


def _derive_sizes(config: C, ranks: int) -> C:
    """The derived axis takes what the others leave of `ranks`, unless it has a size of its own."""
    [derived] = [name for name, kind in AXES.items() if kind.derived]
    if getattr(config.parallel, derived) is not None:
        return config
    return changed(config, {f"parallel.{derived}": max(1, ranks // config.parallel.layout.world)})


def _auto(config: T, ranks: int) -> Layout:
    """The layout that `parallel=auto` picks: as much dp as the batch allows (it talks least), then tp, then pp.

    Raises ConfigError if no layout of `ranks` ranks is feasible, naming the largest number that is.
    """
    if any(getattr(config.parallel, name) != (None if kind.derived else 1) for name, kind in AXES.items()):
        *others, last = AXES
        problem = f"it chooses {', '.join(others)} and {last} itself; leave them out, or use auto=false"
        raise ConfigError("parallel.auto", True, problem)
    ranks_of_table = table_ranks(config.pipeline.schedule)

    def fitting(number: int) -> list[Layout]:
        there = layouts_of(number)
        if ranks_of_table is not None:
            there = [layout for layout in there if layout["pp"] == ranks_of_table]
        return [layout for layout in there if why_not(config, layout) is None]

    exact = fitting(ranks)
    if not exact:
        bound = config.model.heads * (config.model.all_layers + 2) * config.train.global_batch_size
        fewer = range(min(ranks - 1, bound), 0, -1)[:MOST_TRIED]
        most = next((number for number in fewer if fitting(number)), 0)
        problem = f"no {'*'.join(AXES)} of {ranks} ranks divides heads, ffn, layers and batch"
        raise ConfigError("parallel.auto", True, f"{problem}; " + (f"devices={most} works" if most else "change them"))
    return max(exact, key=lambda layout: (layout["dp"], layout["tp"]))
