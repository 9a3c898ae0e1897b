"""From compute actions to a schedule that can run: the transfers and reductions that follow from them."""

from collections.abc import Sequence

from megapar.schedule.actions import COMPUTE, Action, Row, Rows, Schedule, ScheduleError, placement


def lower(rows: Sequence[Sequence[Action]], stages: int, microbatches: int) -> Schedule:
    """Add transfers and reductions to compute actions.

    A receive stands right before the action that needs it and a send right after the one that makes it: the executor
    posts receives ahead and never waits for a send, so their place costs nothing. Neighbours on one rank, as at the
    turn of a V, hand over without a transfer. Reductions end a row. Raises ScheduleError for a kind that is none.
    """
    ranks = placement(rows, stages)
    # remote[s]: stages s - 1 and s live on different ranks, so that a transfer passes between them
    remote = [False, *(ranks[stage] != ranks[stage - 1] for stage in range(1, stages)), False]
    lowered: list[tuple[Action, ...]] = []
    for row in rows:
        actions: Row = []
        add = actions.append
        for action in row:
            stage, kind, m = action
            if kind not in COMPUTE:
                problem = f"unknown kind {kind!r}; a schedule's rows have {', '.join(COMPUTE)}"
                raise ScheduleError(f"row {len(lowered)}, computation {row.index(action)}, {action}: {problem}")
            if not 0 <= stage < stages:  # the checker names it
                add(action)
            elif kind == "F":
                if remote[stage]:
                    add(Action(stage, "RECV_F", m))
                add(action)
                if remote[stage + 1]:
                    add(Action(stage, "SEND_F", m))
            elif kind == "W":
                add(action)
            else:
                if remote[stage + 1]:
                    add(Action(stage, "RECV_B", m))
                add(action)
                if remote[stage]:
                    add(Action(stage, "SEND_B", m))
        # Last of all: a reduction runs from its stage's last gradient on, and to wait for it earlier would hold up the
        # other stages, for ever where a tied one needs the rank at the other end.
        for stage in sorted({a.stage for a in row if a.kind in ("B", "W")}, reverse=True):
            add(Action(stage, "REDUCE"))
        lowered.append(tuple(actions))
    return Schedule(stages, microbatches, tuple(lowered))


def forward_only(ranks: Sequence[int], microbatches: int) -> Rows:
    """Evaluation: forwards only, for the placement `ranks` of a training schedule (the rank of every stage).

    Every rank follows one order, (group of micro-batches, stage, micro-batch), so that nothing can wait in a circle. A
    group has as many micro-batches as there are ranks. With one stage per rank `ranks` is range(stages).
    """
    group = max(ranks) + 1
    rows: Rows = [[] for _ in range(group)]
    for first in range(0, microbatches, group):
        for stage, rank in enumerate(ranks):
            rows[rank] += [Action(stage, "F", m) for m in range(first, min(first + group, microbatches))]
    return rows
