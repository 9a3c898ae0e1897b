"""Which layers a stage holds."""

from itertools import accumulate


def partition(layers: int, stages: int, choice: str | list[int]) -> list[range]:
    """Layers of each stage: `uniform`, or the number of layers per stage.

    Uniform counts that don't divide put one layer more on the middle and early stages, never on the last, which holds
    the head, unless all others have it too.
    """
    counts = choice if isinstance(choice, list) else [(layers + stages - 1 - s) // stages for s in range(stages)]
    assert len(counts) == stages and sum(counts) == layers, f"{counts} for {layers} layers on {stages} stages"
    ends = list(accumulate(counts))
    return [range(end - count, end) for count, end in zip(counts, ends, strict=True)]
