"""Schedules: pure functions from (stages, micro-batches) to the compute actions of every rank.

A schedule knows nothing of tensors or processes. `lower` adds the transfers that follow from it.
"""

from collections.abc import Callable

from megapar.schedule.actions import Action, Schedule

Rows = list[list[Action]]


def gpipe(stages: int, microbatches: int) -> Rows:
    """All forwards, then all backwards; every stage holds all micro-batches (Huang et al. 2019)."""
    return [
        [Action(stage, "F", m) for m in range(microbatches)] + [Action(stage, "B", m) for m in range(microbatches)]
        for stage in range(stages)
    ]


def one_forward_one_backward(stages: int, microbatches: int) -> Rows:
    """1F1B: after a warm-up of forwards each forward is followed by the oldest backward (Narayanan et al. 2019).

    Stage s holds at most min(stages - s, micro-batches) micro-batches; the bubble is GPipe's.
    """
    rows = []
    for stage in range(stages):
        warm_up = min(stages - stage - 1, microbatches)
        row = [Action(stage, "F", m) for m in range(warm_up)]
        for m in range(warm_up, microbatches):
            row += [Action(stage, "F", m), Action(stage, "B", m - warm_up)]
        row += [Action(stage, "B", m) for m in range(microbatches - warm_up, microbatches)]
        rows.append(row)
    return rows


def forward_only(stages: int, microbatches: int) -> Rows:
    """Evaluation: forwards in order."""
    return [[Action(stage, "F", m) for m in range(microbatches)] for stage in range(stages)]


SCHEDULES: dict[str, Callable[[int, int], Rows]] = {"gpipe": gpipe, "1f1b": one_forward_one_backward}


def ideal_bubble(stages: int, microbatches: int) -> float:
    """Idle share of a rank's pipeline phase for equal stages and free transfers, 1F1B and GPipe alike."""
    return (stages - 1) / (microbatches + stages - 1)


def lower(rows: Rows, stages: int, microbatches: int) -> Schedule:
    """Add transfers and reductions to compute actions.

    A receive stands right before the action that needs it and a send right after the one that makes it: the executor
    posts receives ahead and never waits for a send, so their place costs nothing.
    """
    ranks = len(rows)

    def elsewhere(stage: int, other: int) -> bool:
        return 0 <= other < stages and other % ranks != stage % ranks

    lowered = []
    for row in rows:
        actions = []
        last_of_stage = {action.stage: at for at, action in enumerate(row) if action.kind in ("B", "W")}
        for at, action in enumerate(row):
            stage, kind, m = action.stage, action.kind, action.microbatch
            if kind == "F" and elsewhere(stage, stage - 1):
                actions.append(Action(stage, "RECV_F", m))
            if kind in ("B", "I") and elsewhere(stage, stage + 1):
                actions.append(Action(stage, "RECV_B", m))
            actions.append(action)
            if kind == "F" and elsewhere(stage, stage + 1):
                actions.append(Action(stage, "SEND_F", m))
            if kind in ("B", "I") and elsewhere(stage, stage - 1):
                actions.append(Action(stage, "SEND_B", m))
            if last_of_stage.get(stage) == at:
                actions.append(Action(stage, "REDUCE"))
        lowered.append(tuple(actions))
    return Schedule(stages, microbatches, tuple(lowered))


def build(name: str, stages: int, microbatches: int) -> Schedule:
    """The named schedule with its transfers."""
    return lower(SCHEDULES[name](stages, microbatches), stages, microbatches)
