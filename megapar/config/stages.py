"""Which parts of a configured model a stage holds and what they cost, before anything has run: pure functions."""

from collections.abc import Sequence
from itertools import accumulate

from megapar.config.errors import ConfigError
from megapar.config.model import Part, parts, state_bytes
from megapar.config.schema import TrainConfig
from megapar.schedule.actions import Schedule, ScheduleError
from megapar.schedule.build import build
from megapar.schedule.costs import Costs, read_costs
from megapar.schedule.partition import PartitionError, balanced, uniform
from megapar.schedule.simulate import simulate

GIB = float(1 << 30)


def num_stages(config: TrainConfig) -> int:
    """Stages of a resolved config: pipeline ranks times the stages on each; without a pipeline one."""
    return config.parallel.pp * (config.pipeline.chunks or 1) if config.parallel.pp > 1 else 1


def num_microbatches(config: TrainConfig) -> int:
    """Micro-batches of a step on one data-parallel rank."""
    train = config.train
    return train.global_batch_size // (train.micro_batch_size * config.parallel.layout.over("samples"))


def stage_parts(config: TrainConfig) -> list[list[Part]]:
    """The parts of every stage by `pipeline.partition`.

    Raises ConfigError where no partition keeps within the devices' memory.
    """
    whole = parts(config)
    ends = list(accumulate(_part_counts(config, whole)))
    return [whole[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def stage_layers(config: TrainConfig) -> list[int]:
    """Layers of every stage, as `pipeline.partition` lists them. A stage that has embedding or head may have none."""
    return [sum(part.kind == "layer" for part in stage) for stage in stage_parts(config)]


def stage_names(config: TrainConfig) -> list[str]:
    """What every stage has, in words: its first part and its last."""
    stages = [[part.name for part in stage] for stage in stage_parts(config)]
    return [names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}" for names in stages]


def ties(config: TrainConfig) -> dict[str, tuple[list[int], Part]]:
    """The stages that hold a copy of each tied weight, and the first part of the model that does, by its name."""
    found: dict[str, tuple[list[int], Part]] = {}
    for number, stage in enumerate(stage_parts(config)):
        first = {name: part for part in reversed(stage) for name in part.ties}
        for name, holder in first.items():
            found.setdefault(name, ([], holder))[0].append(number)
    return found


def _part_counts(config: TrainConfig, whole: Sequence[Part]) -> list[int]:
    choice, stages = config.pipeline.partition, num_stages(config)
    if stages == 1:
        return [len(whole)]
    assert not isinstance(choice, dict), "resolve the configuration first"
    if isinstance(choice, list) or choice == "uniform":
        layers = choice if isinstance(choice, list) else uniform(config.model.all_layers, stages)
        return _with_ends(whole, layers)
    costs = part_costs(config)
    time = [sum(of_part) for of_part in zip(costs.forward, costs.input_grad, costs.weight_grad, strict=True)]
    memory, limit = _memory(config, whole)
    try:
        return balanced(time, stages, speed=_speeds(config), memory=memory, memory_limit=limit)
    except PartitionError:
        problem = "the parts of the model don't fit into them; raise it, raise parallel.tp, or use train.recompute=full"
        raise ConfigError("pipeline.device_memory", config.pipeline.device_memory, problem) from None


def _with_ends(whole: Sequence[Part], layers: Sequence[int]) -> list[int]:
    """Parts per stage for layers per stage. What is not a layer goes with the layer in front of it, and an embedding
    with the one behind it."""
    where = [number for number, part in enumerate(whole) if part.kind == "layer"]
    starts = [where[first] if first < len(where) else where[-1] + 1 for first in [0, *accumulate(layers)][1:-1]]
    starts = [start - (start > 1 and whole[start - 1].kind == "embedding") for start in starts]
    return [end - start for start, end in zip([0, *starts], [*starts, len(whole)], strict=True)]


def stage_costs(config: TrainConfig) -> Costs:
    """Costs of every stage, for schedules that look at them."""
    return part_costs(config).cut([len(stage) for stage in stage_parts(config)], _speeds(config))


def make_schedule(config: TrainConfig) -> Schedule:
    """The schedule of a step. Without a pipeline there is nothing to choose: forward and backward in turn.

    Raises ScheduleError.
    """
    pipeline, pp, microbatches = config.pipeline, config.parallel.pp, num_microbatches(config)
    if pp == 1:
        return build("1f1b", 1, microbatches)
    limit = float("inf") if pipeline.memory_limit is None else pipeline.memory_limit
    chunks, costs = pipeline.chunks, stage_costs(config)
    return build(pipeline.schedule, pp, microbatches, chunks=chunks, costs=costs, memory_limit=limit)


def part_costs(config: TrainConfig) -> Costs:
    """Costs of every part: measured ones from `pipeline.costs`, else estimated. Raises ConfigError."""
    layers, path = config.model.all_layers, config.pipeline.costs
    whole = parts(config)
    if path is None:
        return _estimated(config, whole)
    try:
        measured = read_costs(path, config.parallel.pp)
    except ScheduleError as error:
        raise ConfigError("pipeline.costs", path, str(error)) from None
    if measured.stages != layers:
        problem = f"has costs of {measured.stages} layers, and model.layers={layers}; take a run of this model's"
        raise ConfigError("pipeline.costs", path, problem)
    return measured.apart()


def _estimated(config: TrainConfig, whole: Sequence[Part]) -> Costs:
    """Floating-point operations per token. An embedding has next to none."""
    again = {
        "none": lambda part: 0.0,
        "selective": lambda part: part.attention,
        "full": lambda part: part.matmul + part.attention if part.kind == "layer" else 0.0,
    }[config.train.recompute]
    layers = sum(part.kind == "layer" for part in whole)
    return Costs(
        forward=tuple(part.matmul + part.attention for part in whole),
        input_grad=tuple(part.matmul + 2 * part.attention + again(part) for part in whole),
        weight_grad=tuple(0.0 if config.model.lora.rank else part.matmul for part in whole),
        activation=tuple(config.parallel.pp / layers if part.kind == "layer" else 0.0 for part in whole),
        reduce=(0.0,) * len(whole),
    )


def _speeds(config: TrainConfig) -> list[float] | None:
    """Of the device of every stage."""
    speed = config.pipeline.speed
    return None if speed is None else [speed[rank] for rank in _evenly(config).placement]


def _evenly(config: TrainConfig) -> Schedule:
    """The schedule for stages that are all alike: where its stages live is where the real one's do."""
    return build(config.pipeline.schedule, config.parallel.pp, num_microbatches(config), chunks=config.pipeline.chunks)


def _memory(config: TrainConfig, whole: Sequence[Part]) -> tuple[list[list[float]] | None, list[float] | None]:
    """What every part takes on each stage, by stage, and what each stage may hold, in bytes; None without a limit.

    Stages of one device have equal shares of it. A part's activations take as often as its rank holds micro-batches.
    """
    devices = config.pipeline.device_memory
    if devices is None:
        return None, None
    schedule = _evenly(config)
    held, chunks = simulate(schedule).peak, schedule.stages // len(schedule.rows)
    state = [state_bytes(config, part) * part.weights / config.parallel.tp for part in whole]
    memory = [
        [of_part + held[rank] * part.activation for of_part, part in zip(state, whole, strict=True)]
        for rank in schedule.placement
    ]
    return memory, [GIB * devices[rank] / chunks for rank in schedule.placement]
