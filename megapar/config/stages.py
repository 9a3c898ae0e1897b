"""What a stage of a configured model holds and costs, before anything has run: pure functions of a resolved config."""

from dataclasses import replace

from megapar.config.errors import ConfigError
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


def stage_layers(config: TrainConfig) -> list[int]:
    """Layers of every stage by `pipeline.partition`. Raises ConfigError where none keeps within the devices' memory."""
    choice, layers, stages = config.pipeline.partition, config.model.layers, num_stages(config)
    if isinstance(choice, list):
        return choice
    if choice == "uniform" or stages == 1:
        return uniform(layers, stages)
    costs = layer_costs(config)
    time = [sum(of_layer) for of_layer in zip(costs.forward, costs.input_grad, costs.weight_grad, strict=True)]
    room = _room(config)
    try:
        return balanced(time, stages, speed=_speeds(config), memory=[1.0] * layers, memory_limit=room)
    except PartitionError:
        problem = "the layers don't fit into them; raise it, raise parallel.tp, or recompute: train.recompute=full"
        raise ConfigError("pipeline.device_memory", config.pipeline.device_memory, problem) from None


def stage_costs(config: TrainConfig) -> Costs:
    """Costs of every stage, for schedules that look at them."""
    return layer_costs(config).cut(stage_layers(config), _speeds(config))


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


def layer_costs(config: TrainConfig) -> Costs:
    """Costs of every layer: measured ones from `pipeline.costs`, else estimated. Raises ConfigError.

    The first layer's include the embedding and the last one's the head: they can't be parted from them.
    """
    layers, path = config.model.layers, config.pipeline.costs
    if path is None:
        return _estimated(config)
    try:
        measured = read_costs(path, config.parallel.pp)
    except ScheduleError as error:
        raise ConfigError("pipeline.costs", path, str(error)) from None
    if measured.stages != layers:
        problem = f"has costs of {measured.stages} layers, and model.layers={layers}; take a run of this model's"
        raise ConfigError("pipeline.costs", path, problem)
    return measured


def _estimated(config: TrainConfig) -> Costs:
    """Floating-point operations per token. An embedding has next to none; a causal mask does not halve attention here,
    as the torch kernels multiply all of it."""
    model, recompute = config.model, config.train.recompute
    assert model.kv_heads and model.head_dim and model.ffn, "resolve the configuration first"
    heads_width = model.heads * model.head_dim
    matmul = 2.0 * _layer_weights(config)
    attention = 4.0 * heads_width * config.train.seq_length
    again = {"none": 0.0, "selective": attention, "full": matmul + attention}[recompute]
    head = 2.0 * model.hidden * (model.vocab_size or 0)
    forward, input_grad = matmul + attention, matmul + 2 * attention + again
    last = [0.0] * (model.layers - 1) + [head]
    return Costs(
        forward=tuple(forward + of_head for of_head in last),
        input_grad=tuple(input_grad + of_head for of_head in last),
        weight_grad=tuple(matmul + of_head for of_head in last),
        activation=(config.parallel.pp / model.layers,) * model.layers,
        reduce=(0.0,) * model.layers,
    )


def _layer_weights(config: TrainConfig) -> int:
    """Elements of a layer's matrices over all tensor-parallel ranks."""
    model = config.model
    assert model.kv_heads and model.head_dim and model.ffn
    attention = 2 * (model.heads + model.kv_heads) * model.head_dim * model.hidden
    return attention + (3 if model.gated else 2) * model.hidden * model.ffn


def _speeds(config: TrainConfig) -> list[float] | None:
    """Of the device of every stage."""
    speed = config.pipeline.speed
    return None if speed is None else [speed[rank] for rank in _evenly(config).placement]


def _evenly(config: TrainConfig) -> Schedule:
    """The schedule for stages that are all alike: where its stages live is where the real one's do."""
    alike = replace(config.pipeline, partition="uniform", costs=None, speed=None, device_memory=None)
    return make_schedule(replace(config, pipeline=alike))


def _room(config: TrainConfig) -> list[float] | None:
    """How many layers every stage has memory for, beside embedding and head; None without a limit.

    Stages of one device have equal shares of it.
    """
    memory = config.pipeline.device_memory
    if memory is None:
        return None
    model, parallel = config.model, config.parallel
    schedule = _evenly(config)
    held, chunks = simulate(schedule).peak, schedule.stages // len(schedule.rows)
    room = [GIB * memory[rank] / chunks for rank in schedule.placement]
    table = state_bytes(config) * model.hidden * (model.vocab_size or 0) / parallel.tp
    room[0] -= table
    room[-1] -= table
    layer = state_bytes(config) * _layer_weights(config) / parallel.tp
    needs = [layer + held[rank] * activation_bytes(config) for rank in schedule.placement]
    return [max(0.0, has / of_layer) for has, of_layer in zip(room, needs, strict=True)]


def state_bytes(config: TrainConfig) -> float:
    """Bytes per parameter: weight, gradient, two moments, and a master copy where the weight is bf16."""
    weight, wide = {"fp64": (8, 8), "fp32": (4, 4), "bf16": (2, 4)}[config.train.dtype]
    optimizer = 2 * wide + (wide if weight < wide else 0)
    return weight + wide + (optimizer / (config.parallel.dp or 1) if config.parallel.zero else optimizer)


def activation_bytes(config: TrainConfig) -> float:
    """Bytes that a layer keeps of one micro-batch for its backward on one tensor-parallel rank, about."""
    model, train, parallel = config.model, config.train, config.parallel
    assert model.kv_heads and model.head_dim and model.ffn
    size, wide = {"fp64": (8, 8), "fp32": (4, 4), "bf16": (2, 4)}[train.dtype]
    tokens = train.micro_batch_size * train.seq_length
    outside = 1 / parallel.tp if parallel.sequence_parallel else 1.0  # share of the tokens between parallel regions
    if train.recompute == "full":
        return tokens * model.hidden * outside * size
    # Norms: input and normalised values in the wide dtype; their outputs, read by qkv and up, in the other one.
    norms = 2 * model.hidden * (outside * 2 * wide + size)
    heads = 2 * (model.heads + model.kv_heads) * model.head_dim / parallel.tp * size
    probabilities = 0.0 if train.recompute == "selective" else model.heads * train.seq_length / parallel.tp * size
    mlp = (4 if model.gated else 2) * model.ffn / parallel.tp * size
    return tokens * (norms + heads + probabilities + mlp)
