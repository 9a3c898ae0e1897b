"""How many layers a stage holds."""

from collections.abc import Sequence
from itertools import accumulate


class PartitionError(ValueError):
    """No partition can keep the memory limits; one line says what is missing."""


def uniform(layers: int, stages: int) -> list[int]:
    """Layers of each stage, as even as can be.

    Counts that don't divide put one layer more on the middle and early stages, never on the last, which holds the head,
    unless all others have it too.
    """
    return [(layers + stages - 1 - stage) // stages for stage in range(stages)]


def ranges(counts: Sequence[int]) -> list[range]:
    """The layers by number of stages with so many each."""
    ends = list(accumulate(counts))
    return [range(end - count, end) for count, end in zip(counts, ends, strict=True)]


def balanced(
    costs: Sequence[float],
    stages: int,
    *,
    embedding: float = 0.0,
    head: float = 0.0,
    speed: Sequence[float] | None = None,
    memory: Sequence[float] | None = None,
    memory_limit: Sequence[float] | None = None,
    embedding_memory: float = 0.0,
    head_memory: float = 0.0,
) -> list[int]:
    """Layers per stage that make the slowest stage as fast as can be; every stage has at least one.

    costs: time of each layer on a device of speed 1; embedding, head: what the first and the last stage have on top
    speed: of each stage's device, 1 where left out; half the speed takes twice the time
    memory, embedding_memory, head_memory: what layers, embedding and head take; memory_limit: of each stage's device.
        Weights, gradients and optimizer state, plus the activations of as many micro-batches as the stage holds

    Exact: dynamic programming over (stage, layers so far), O(stages * layers^2). Of equally good ones it takes the one
    whose later stages have fewer layers. Raises PartitionError where no partition keeps the limits.
    """
    layers = len(costs)
    speed = [1.0] * stages if speed is None else speed
    memory = [0.0] * layers if memory is None else memory
    limit = [float("inf")] * stages if memory_limit is None else memory_limit
    assert len(speed) == len(limit) == stages and len(memory) == layers, "a number per stage, or per layer"
    if layers < stages:
        raise PartitionError(f"{layers} layers can't fill {stages} stages")
    time_up_to, memory_up_to = [0.0, *accumulate(costs)], [0.0, *accumulate(memory)]
    extra, extra_memory = [0.0] * stages, [0.0] * stages
    extra[0], extra_memory[0] = embedding, embedding_memory
    extra[-1], extra_memory[-1] = extra[-1] + head, extra_memory[-1] + head_memory

    # best[end]: the slowest stage's time of the best partition of the first `end` layers over the stages so far
    best = [0.0] + [float("inf")] * layers
    starts: list[list[int]] = []  # for each stage and end, where the stage starts in that partition
    for stage in range(stages):
        so_far, chosen = [float("inf")] * (layers + 1), [-1] * (layers + 1)
        for end in range(stage + 1, layers - (stages - stage - 1) + 1):
            for start in range(end - 1, stage - 1, -1):
                if memory_up_to[end] - memory_up_to[start] + extra_memory[stage] > limit[stage]:
                    break  # and more layers take more
                time = (time_up_to[end] - time_up_to[start] + extra[stage]) / speed[stage]
                slowest = max(best[start], time)
                if slowest < so_far[end]:
                    so_far[end], chosen[end] = slowest, start
                if time >= so_far[end]:
                    break  # costs are not negative: more layers are not faster
        best = so_far
        starts.append(chosen)
    if best[layers] == float("inf"):
        raise PartitionError(_why_impossible(memory_up_to[-1] + embedding_memory + head_memory, limit, layers))
    counts, end = [], layers
    for chosen in reversed(starts):
        counts.append(end - chosen[end])
        end = chosen[end]
    return counts[::-1]


WORTH_MOVING = 0.05  # shorter slowest stage: less is the noise of measured times, and a move costs a checkpoint


def rebalanced(counts: Sequence[int], layer: Sequence[float], rest: Sequence[float]) -> list[int]:
    """Layers per stage for measured times, or `counts` again where a move is not worth it.

    layer: seconds of one layer on the device of each stage, forward and backward of one micro-batch
    rest: seconds of everything else of the stage: embedding, head, loss

    Layers are taken to be equal in work, so that a device's speed is known from those it has.
    """

    def slowest(counts: Sequence[int]) -> float:
        return max(count * one + other for count, one, other in zip(counts, layer, rest, strict=True))

    speed = [1 / seconds for seconds in layer]
    embedding, head = rest[0] * speed[0], rest[-1] * speed[-1]
    found = balanced([1.0] * sum(counts), len(counts), embedding=embedding, head=head, speed=speed)
    return found if slowest(found) < (1 - WORTH_MOVING) * slowest(counts) else list(counts)


def _why_impossible(needed: float, limit: Sequence[float], layers: int) -> str:
    room = sum(limit)
    if needed > room:
        return f"{layers} layers need {needed:g} of memory and the devices have {room:g}; use more or larger ones"
    return (
        f"{layers} layers need {needed:g} of memory and the devices have {room:g}, but whole layers in order don't fit "
        "into any of their splits; use larger devices, or another order of them"
    )
