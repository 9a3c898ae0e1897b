"""Costs from a run: what each stage's actions took."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import median

from megapar.schedule.actions import Action, Schedule, ScheduleError
from megapar.schedule.costs import BY_STAGE, Costs


def measured_costs(schedule: Schedule, spans: Iterable[tuple[Action | str, float]]) -> Costs:
    """The median seconds of each stage's F, I, W and REDUCE, as costs for the simulator and for `auto`.

    spans: (action or its text, seconds) as the pipeline ranks of a replica ran them, of one step or several, in any
        order; a wait for tp or dp inside an action is part of it. Sends and receives are left out: what they cost shows
        as time between actions.

    A stage that ran B only gets half of its median for each of I and W: no order of B's can tell them apart. Memory is
    1 a rank and micro-batch, as it can't be seen in times. Raises ScheduleError for a stage that lacks F or backward.
    """
    seconds: defaultdict[tuple[int, str], list[float]] = defaultdict(list)
    for what, took in spans:
        action = Action.parse(what) if isinstance(what, str) else what
        seconds[action.stage, action.kind].append(took)

    def median_of(stage: int, kind: str) -> float:
        if not seconds[stage, kind]:
            raise ScheduleError(f"no {kind} of stage {stage} was measured; it takes a whole training step of all ranks")
        return median(seconds[stage, kind])

    stages = range(schedule.stages)
    halves = {stage: median_of(stage, "B") / 2 for stage in stages if not seconds[stage, "I"]}
    return Costs(
        forward=tuple(median_of(stage, "F") for stage in stages),
        input_grad=tuple(halves[stage] if stage in halves else median_of(stage, "I") for stage in stages),
        weight_grad=tuple(halves[stage] if stage in halves else median_of(stage, "W") for stage in stages),
        activation=(len(schedule.rows) / schedule.stages,) * schedule.stages,
        reduce=tuple(median(seconds[stage, "REDUCE"] or [0.0]) for stage in stages),
    )


def spread(costs: Costs, counts: Sequence[int], in_layers: Sequence[float]) -> Costs:
    """Costs of every layer from those of stages with counts[s] layers each.

    in_layers[s]: the share of stage s's times that its layers take, all equally. The rest is the embedding's, and is
    part of the first layer's costs, or the head's, and part of those of the last one of the model; of a single stage it
    is the head's, and of a stage in the middle it is spread. A stage without layers has nothing else.
    """
    last = len(counts) - 1
    ends: dict[str, list[float]] = {"embedding": [], "head": []}

    def of_layers(name: str) -> tuple[float, ...]:
        values: list[float] = []
        rest = {"embedding": 0.0, "head": 0.0}
        for stage, (cost, count) in enumerate(zip(getattr(costs, name), counts, strict=True)):
            end = None if name == "activation" else "head" if stage == last else "embedding" if stage == 0 else None
            layers = 0.0 if not count else cost if end is None else cost * in_layers[stage]
            values += [layers / max(1, count)] * count
            if end is not None:
                rest[end] = cost - layers
        values[0] += rest["embedding"]
        values[-1] += rest["head"]
        for end, of_end in rest.items():
            ends[end].append(of_end)
        return tuple(values)

    lists = {name: of_layers(name) for name in BY_STAGE}
    embedding, head = (tuple(ends[end][:3]) for end in ("embedding", "head"))
    return replace(costs, **lists, embedding=embedding, head=head)  # type: ignore[arg-type]
