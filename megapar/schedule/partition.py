"""How many parts of a model, or layers, a stage holds."""

from collections.abc import Sequence
from itertools import accumulate
from statistics import median


class PartitionError(ValueError):
    """No partition can keep the memory limits; one line says what is missing."""


def uniform(layers: int, stages: int) -> list[int]:
    """Layers of each stage, as even as can be.

    Counts that don't divide put one layer more on the middle and early stages, never on the last, which holds the head,
    unless all others have it too.
    """
    return [(layers + stages - 1 - stage) // stages for stage in range(stages)]


def balanced(
    costs: Sequence[float],
    stages: int,
    *,
    speed: Sequence[float] | None = None,
    memory: Sequence[Sequence[float]] | None = None,
    memory_limit: Sequence[float] | None = None,
) -> list[int]:
    """Parts of a model per stage that make the slowest stage as fast as can be; every stage has at least one.

    costs: time of each part on a device of speed 1
    speed: of each stage's device, 1 where left out; half the speed takes twice the time
    memory: by stage, what each part takes there: weights, gradients and optimizer state, plus the activations of as
        many micro-batches as the stage holds; memory_limit: of each stage's device

    Exact: dynamic programming over (stage, parts so far), O(stages * parts^2). Of equally good ones it takes the one
    whose later stages have fewer parts. Raises PartitionError where no partition keeps the limits.
    """
    parts = len(costs)
    speed = [1.0] * stages if speed is None else speed
    memory = [[0.0] * parts] * stages if memory is None else memory
    limit = [float("inf")] * stages if memory_limit is None else memory_limit
    assert len(speed) == len(limit) == len(memory) == stages, "a number per stage"
    assert all(len(of_stage) == parts for of_stage in memory), "a number per part"
    if parts < stages:
        raise PartitionError(f"{parts} parts can't fill {stages} stages")
    time_up_to = [0.0, *accumulate(costs)]

    # best[end]: the slowest stage's time of the best partition of the first `end` parts over the stages so far
    best = [0.0] + [float("inf")] * parts
    starts: list[list[int]] = []  # for each stage and end, where the stage starts in that partition
    for stage in range(stages):
        so_far, chosen = [float("inf")] * (parts + 1), [-1] * (parts + 1)
        memory_up_to = [0.0, *accumulate(memory[stage])]
        for end in range(stage + 1, parts - (stages - stage - 1) + 1):
            for start in range(end - 1, stage - 1, -1):
                if memory_up_to[end] - memory_up_to[start] > limit[stage]:
                    break  # and more parts take more
                time = (time_up_to[end] - time_up_to[start]) / speed[stage]
                slowest = max(best[start], time)
                if slowest < so_far[end]:
                    so_far[end], chosen[end] = slowest, start
                if time >= so_far[end]:
                    break  # costs are not negative: more parts are not faster
        best = so_far
        starts.append(chosen)
    if best[parts] == float("inf"):
        raise PartitionError(_why_impossible(memory, limit, parts))
    counts, end = [], parts
    for chosen in reversed(starts):
        counts.append(end - chosen[end])
        end = chosen[end]
    return counts[::-1]


WORTH_MOVING = 0.05  # shorter slowest stage: less is the noise of measured times, and a move costs a checkpoint


def rebalanced(counts: Sequence[int], layer: Sequence[float | None], rest: Sequence[float]) -> list[int]:
    """Layers per stage for measured times, or `counts` again where a move is not worth it.

    layer: seconds of one layer on the device of each stage, forward and backward of one micro-batch; None for a stage
        without layers, whose device is taken for one of the middle
    rest: seconds of everything else of the stage: embedding, head, loss

    Layers are taken to be equal in work, so that a device's speed is known from those it has.
    """
    usual = median(seconds for seconds in layer if seconds is not None)
    of_one = [usual if seconds is None else seconds for seconds in layer]

    def slowest(counts: Sequence[int]) -> float:
        return max(count * one + other for count, one, other in zip(counts, of_one, rest, strict=True))

    speed = [1 / seconds for seconds in of_one]
    costs = [rest[0] * speed[0], *[1.0] * sum(counts), rest[-1] * speed[-1]]
    found = balanced(costs, len(counts), speed=speed)
    found[0] -= 1
    found[-1] -= 1
    return found if slowest(found) < (1 - WORTH_MOVING) * slowest(counts) else list(counts)


def _why_impossible(memory: Sequence[Sequence[float]], limit: Sequence[float], parts: int) -> str:
    room, needed = sum(limit), sum(map(min, zip(*memory, strict=True)))
    if needed > room:
        return f"{parts} parts need {needed:g} of memory and the devices have {room:g}; use more or larger ones"
    return (
        f"{parts} parts need {needed:g} of memory and the devices have {room:g}, but whole parts in order don't fit "
        "into any of their splits; use larger devices, or another order of them"
    )
