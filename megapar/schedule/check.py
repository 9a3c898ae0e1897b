"""Proof that a schedule can run: complete, ordered, every receive with its send, no deadlock; and what it holds."""

from collections.abc import Sequence
from dataclasses import dataclass

from megapar.schedule.actions import Action, Schedule, ScheduleError


@dataclass(frozen=True)
class Proof:
    """What the check found out.

    in_flight[r]: the most micro-batches that rank r holds at once, forward done and backward (B, or W) not, summed over
        its stages; in_flight_by_stage[s]: the same of one stage alone
    rendezvous: None if the table would also run with sends that wait for their receiver, else where it would stop
    """

    in_flight: tuple[int, ...]
    in_flight_by_stage: tuple[int, ...]
    rendezvous: str | None = None


def check(schedule: Schedule, *, training: bool = False, rendezvous: bool = False) -> Proof:
    """Prove a schedule, in time linear in its actions. Raises `ScheduleError` naming the first offending action.

    Sends don't wait (the executor's are asynchronous); a receive waits for its own message, whatever else the channel
    delivers before it (`Schedule.channel_order`). So the only order that matters is that of the rows.

    training: every stage needs the backward of every micro-batch, also if no row has one
    rendezvous: find out, too, whether it would run with sends that wait for their receiver
    """
    if -1 in schedule.placement:
        raise ScheduleError(f"stage {schedule.placement.index(-1)}: no rank has it")
    if () in schedule.rows:
        raise ScheduleError(f"rank {schedule.rows.index(())}: no action; every rank needs a stage")
    replay = _Replay(schedule, training)
    replay.run()
    replay.refuse_stuck()
    replay.refuse_incomplete()
    where = None
    if rendezvous:
        where = _rendezvous(schedule) or None
    return Proof(tuple(replay.peak), tuple(replay.peak_of_stage), where)


class _Replay:
    """Runs every row until it has to wait, and wakes it when what it waits for has been sent."""

    def __init__(self, schedule: Schedule, training: bool) -> None:
        self.schedule = schedule
        self.rows, self.stages, self.microbatches = schedule.rows, schedule.stages, schedule.microbatches
        self.ranks = schedule.placement
        self.training = training or any(action.kind in ("B", "I") for row in self.rows for action in row)
        self.position = [0] * len(self.rows)
        size = self.stages * self.microbatches
        # One byte for (stage, micro-batch): has it been done?
        self.done = {kind: bytearray(size) for kind in ("F", "B", "I", "W", "SEND_F", "SEND_B", "RECV_F", "RECV_B")}
        self.reduced = bytearray(self.stages)
        self.backward = [0] * self.stages  # micro-batches whose weight gradients are complete
        self.held, self.peak = [0] * len(self.rows), [0] * len(self.rows)
        self.held_by_stage, self.peak_of_stage = [0] * self.stages, [0] * self.stages
        self.waiting: dict[tuple[str, int], int] = {}  # (SEND_*, stage * microbatches + m) -> rank
        # remote[s]: a transfer passes between stages s - 1 and s
        self.remote = [False] * (self.stages + 1)
        for stage in range(1, self.stages):
            self.remote[stage] = self.ranks[stage] != self.ranks[stage - 1]

    def run(self) -> None:
        ready = list(range(len(self.rows)))
        while ready:
            self._advance(ready.pop(), ready)

    def _advance(self, rank: int, ready: list[int]) -> None:
        """Run a row until it waits or ends; append to `ready` the ranks that it wakes."""
        row, m_count, done, remote = self.rows[rank], self.microbatches, self.done, self.remote
        forward, backward, inputs = done["F"], done["B"], done["I"]
        at = self.position[rank]
        while at < len(row):
            action = row[at]
            stage, kind, m = action
            if not (0 <= stage < self.stages and 0 <= m < m_count):
                self._refuse(rank, at, "no such stage or micro-batch")
            if self.ranks[stage] != rank:
                self._refuse(rank, at, f"stage {stage} lives on rank {self.ranks[stage]}")
            index = stage * m_count + m
            if kind == "REDUCE":
                if self.reduced[stage]:
                    self._refuse(rank, at, "a second time")
                if self.backward[stage] < m_count:
                    self._refuse(rank, at, f"before the last backward of stage {stage}")
                self.reduced[stage] = 1
                at += 1
                continue
            if done[kind][index]:
                self._refuse(rank, at, "a second time")
            if kind == "RECV_F" or kind == "RECV_B":
                step = -1 if kind == "RECV_F" else 1
                if not 0 <= stage + step < self.stages:
                    self._refuse(rank, at, f"no stage {stage + step} to receive from")
                if not remote[stage + (step > 0)]:
                    self._refuse(rank, at, f"stage {stage + step} is on the same rank and sends nothing")
                send, peer = ("SEND_F" if step < 0 else "SEND_B"), index + step * m_count
                if not done[send][peer]:
                    self.waiting[send, peer] = rank
                    break
            elif kind == "SEND_F" or kind == "SEND_B":
                step = 1 if kind == "SEND_F" else -1
                if not 0 <= stage + step < self.stages:
                    self._refuse(rank, at, f"no stage {stage + step} to send to")
                if not remote[stage + (step > 0)]:
                    self._refuse(rank, at, f"stage {stage + step} is on the same rank and receives nothing")
                if step > 0 and not forward[index]:
                    self._refuse(rank, at, f"before {Action(stage, 'F', m)}")
                if step < 0 and not (backward[index] or inputs[index]):
                    self._refuse(rank, at, "before its backward")
                if (waiter := self.waiting.pop((kind, index), None)) is not None:
                    ready.append(waiter)
            elif kind == "F":
                if stage:
                    if remote[stage]:
                        if not done["RECV_F"][index]:
                            self._refuse(rank, at, f"before {Action(stage, 'RECV_F', m)}")
                    elif not forward[index - m_count]:
                        self._refuse(rank, at, f"before {Action(stage - 1, 'F', m)}")
                self.held[rank] += 1
                self.held_by_stage[stage] += 1
                if self.held[rank] > self.peak[rank]:
                    self.peak[rank] = self.held[rank]
                if self.held_by_stage[stage] > self.peak_of_stage[stage]:
                    self.peak_of_stage[stage] = self.held_by_stage[stage]
            else:
                if kind == "W":
                    if not inputs[index]:
                        self._refuse(rank, at, f"before {Action(stage, 'I', m)}")
                else:
                    if not forward[index]:
                        self._refuse(rank, at, f"before {Action(stage, 'F', m)}")
                    if backward[index] or inputs[index]:
                        self._refuse(rank, at, "a second backward of this micro-batch")
                    if stage + 1 < self.stages:
                        if remote[stage + 1]:
                            if not done["RECV_B"][index]:
                                self._refuse(rank, at, f"before {Action(stage, 'RECV_B', m)}")
                        elif not (backward[index + m_count] or inputs[index + m_count]):
                            self._refuse(rank, at, f"before the backward of stage {stage + 1}")
                if kind != "I":
                    self.backward[stage] += 1
                    self.held[rank] -= 1
                    self.held_by_stage[stage] -= 1
            done[kind][index] = 1
            at += 1
        self.position[rank] = at

    def _refuse(self, rank: int, at: int, problem: str) -> None:
        raise ScheduleError(f"rank {rank}, action {at}, {self.rows[rank][at]}: {problem}")

    def refuse_stuck(self) -> None:
        """Rows that did not end wait for a send: one that no row has, or one that waits itself, in a circle."""
        for rank in _stuck(self.schedule, self.position):
            stage, kind, m = self.rows[rank][self.position[rank]]
            send = Action(stage - 1, "SEND_F", m) if kind == "RECV_F" else Action(stage + 1, "SEND_B", m)
            peer = self.ranks[send.stage]
            if send not in self.rows[peer][self.position[peer] :]:
                self._refuse(rank, self.position[rank], f"{send} is missing")
        if waiting := _positions(self.schedule, self.position):
            raise ScheduleError(f"deadlock: {waiting}")

    def refuse_incomplete(self) -> None:
        """What every stage must have done once all rows have ended.

        A message that nothing receives needs no check: what needs it was refused, or is missing here.
        """
        done, m_count = self.done, self.microbatches
        for stage, rank in enumerate(self.ranks):
            of_stage = slice(stage * m_count, (stage + 1) * m_count)
            if (m := done["F"][of_stage].find(0)) >= 0:
                raise ScheduleError(f"rank {rank}: {Action(stage, 'F', m)} is missing")
            if self.training and self.backward[stage] < m_count:
                m = next(m for m in range(m_count) if not done["B"][of_stage][m] | done["W"][of_stage][m])
                missing = Action(stage, "W" if done["I"][of_stage][m] else "B", m)
                raise ScheduleError(f"rank {rank}: {missing} is missing")
            if self.training and not self.reduced[stage]:
                raise ScheduleError(f"rank {rank}: {Action(stage, 'REDUCE')} is missing")


def _stuck(schedule: Schedule, position: Sequence[int]) -> list[int]:
    return [rank for rank, row in enumerate(schedule.rows) if position[rank] < len(row)]


def _positions(schedule: Schedule, position: Sequence[int]) -> str:
    return ", ".join(f"rank {r} at {schedule.rows[r][position[r]]}" for r in _stuck(schedule, position))


def _rendezvous(schedule: Schedule) -> str:
    """Where the rows of a proven schedule would stop if a send and its receive only passed together; "" if nowhere."""
    rows, ranks = schedule.rows, schedule.placement
    position = [0] * len(rows)
    standing: set[Action] = set()  # transfers that wait for their other end
    ready = list(range(len(rows)))
    while ready:
        rank = ready.pop()
        while position[rank] < len(rows[rank]):
            stage, kind, m = action = rows[rank][position[rank]]
            if kind.startswith(("SEND", "RECV")):
                peer = stage + (1 if kind in ("SEND_F", "RECV_B") else -1)
                other = Action(peer, ("RECV" if kind[0] == "S" else "SEND") + kind[4:], m)
                if other not in standing:
                    standing.add(action)
                    break
                standing.remove(other)
                position[ranks[peer]] += 1
                ready.append(ranks[peer])
            position[rank] += 1
    return _positions(schedule, position)
