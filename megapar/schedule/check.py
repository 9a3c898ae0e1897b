"""Proof that a schedule can run: complete, ordered, every receive with its send, no deadlock; and what it holds."""

from collections import Counter, deque

from megapar.schedule.actions import Action, Schedule


class ScheduleError(ValueError):
    """The schedule can't run; the message names the first offending action."""


def check(schedule: Schedule) -> list[int]:
    """Peak number of micro-batches in flight (forward done, backward not) on each rank.

    Sends don't block (the executor's are asynchronous); receives do, and a channel (sender, receiver, direction)
    delivers in order. Raises `ScheduleError`.
    """
    for rank, row in enumerate(schedule.rows):
        _check_row(schedule, rank, row)
    return _replay(schedule)


def _check_row(schedule: Schedule, rank: int, row: tuple[Action, ...]) -> None:
    done: set[tuple[int, str, int]] = set()
    backward = any(action.kind in ("B", "I") for action in row)
    for at, action in enumerate(row):
        stage, kind, m = action.stage, action.kind, action.microbatch
        where = f"rank {rank}, action {at}, {action}"
        if not (0 <= stage < schedule.stages and 0 <= m < schedule.microbatches):
            raise ScheduleError(f"{where}: no such stage or micro-batch")
        if schedule.rank_of(stage) != rank:
            raise ScheduleError(f"{where}: stage {stage} lives on rank {schedule.rank_of(stage)}")
        if (stage, kind, m) in done:
            raise ScheduleError(f"{where}: a second time")
        needs = {"B": ("F",), "I": ("F",), "W": ("I",), "SEND_F": ("F",)}.get(kind, ())
        for needed in needs:
            if (stage, needed, m) not in done:
                raise ScheduleError(f"{where}: before {Action(stage, needed, m)}")
        if kind == "SEND_B" and not {(stage, "B", m), (stage, "I", m)} & done:
            raise ScheduleError(f"{where}: before its backward")
        if kind == "REDUCE":
            finished = sum((stage, "B", i) in done or (stage, "W", i) in done for i in range(schedule.microbatches))
            if finished < schedule.microbatches:
                raise ScheduleError(f"{where}: before the last backward of stage {stage}")
        elif (stage, "REDUCE", 0) in done and kind in ("B", "W"):
            raise ScheduleError(f"{where}: after {Action(stage, 'REDUCE')}")
        done.add((stage, kind, m))
    for stage in range(rank, schedule.stages, len(schedule.rows)):
        for m in range(schedule.microbatches):
            if (stage, "F", m) not in done:
                raise ScheduleError(f"rank {rank}: {Action(stage, 'F', m)} is missing")
            if backward and ((stage, "B", m) in done) == ((stage, "W", m) in done):
                raise ScheduleError(f"rank {rank}: {Action(stage, 'B', m)}, or I and W, must stand exactly once")
        if backward and (stage, "REDUCE", 0) not in done:
            raise ScheduleError(f"rank {rank}: {Action(stage, 'REDUCE')} is missing")


def _replay(schedule: Schedule) -> list[int]:
    rows = schedule.rows
    position = [0] * len(rows)
    channels: dict[tuple[int, int, str], deque[Action]] = {}
    received: set[tuple[int, str, int]] = set()
    in_flight: Counter[int] = Counter()
    peak = [0] * len(rows)

    def step(rank: int) -> bool:
        """Run the rank's next action if it can run now."""
        if position[rank] == len(rows[rank]):
            return False
        action = rows[rank][position[rank]]
        stage, kind, m = action.stage, action.kind, action.microbatch
        where = f"rank {rank}, action {position[rank]}, {action}"
        if kind.startswith("SEND"):
            peer = stage + (1 if kind == "SEND_F" else -1)
            if not 0 <= peer < schedule.stages:
                raise ScheduleError(f"{where}: no stage {peer} to send to")
            channel = (rank, schedule.rank_of(peer), kind[-1])
            channels.setdefault(channel, deque()).append(Action(peer, f"RECV_{kind[-1]}", m))
        elif kind.startswith("RECV"):
            peer = stage - (1 if kind == "RECV_F" else -1)
            if not 0 <= peer < schedule.stages:
                raise ScheduleError(f"{where}: no stage {peer} to receive from")
            queue = channels.get((schedule.rank_of(peer), rank, kind[-1]))
            if not queue:
                return False
            expected = queue.popleft()
            if expected != action:
                raise ScheduleError(f"{where}: the channel delivers {expected} first")
            received.add((stage, kind, m))
        elif kind != "REDUCE":
            neighbour, needed = {"F": (stage - 1, "RECV_F"), "W": (-1, "")}.get(kind, (stage + 1, "RECV_B"))
            remote = 0 <= neighbour < schedule.stages and schedule.rank_of(neighbour) != rank
            if remote and (stage, needed, m) not in received:
                raise ScheduleError(f"{where}: before {Action(stage, needed, m)}")
            in_flight[rank] += {"F": 1, "I": 0}.get(kind, -1)
            peak[rank] = max(peak[rank], in_flight[rank])
        position[rank] += 1
        return True

    moved = True
    while moved:
        moved = False
        for rank in range(len(rows)):
            while step(rank):
                moved = True
    stuck = [f"rank {r} at {rows[r][position[r]]}" for r in range(len(rows)) if position[r] < len(rows[r])]
    if stuck:
        raise ScheduleError(f"deadlock: {', '.join(stuck)}")
    for (source, target, _), queue in channels.items():
        if queue:
            raise ScheduleError(f"rank {target} never receives {queue[0]} from rank {source}")
    return peak
