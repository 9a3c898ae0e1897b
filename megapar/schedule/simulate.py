"""Replay of a schedule with costs: when every action runs, and what that makes of step time, bubble and memory."""

from dataclasses import dataclass

from megapar.schedule.actions import Action, Schedule
from megapar.schedule.costs import Costs

Span = tuple[float, float, Action]  # start, end, what


@dataclass(frozen=True)
class Simulation:
    """spans[r]: what rank r did, in order. A RECV's span is the wait for a transfer, a SEND's one not overlapped.

    step_time: from the start to the end of the last rank
    busy[r]: time in F, B, I, W and REDUCE
    bubble[r]: share of the step in none of them
    own_bubble[r]: the same between the rank's own first and last action: what is left where ranks need not wait for
        each other between steps
    exposed[r]: time in which the rank waited for a transfer alone: its message had been sent and was on its way
    peak[r]: most memory of activations, in the costs' unit
    """

    spans: list[list[Span]]
    step_time: float
    busy: list[float]
    exposed: list[float]
    peak: list[float]

    @property
    def bubble(self) -> list[float]:
        return [1 - busy / self.step_time for busy in self.busy]

    @property
    def own_bubble(self) -> list[float]:
        return [
            1 - busy / (spans[-1][1] - spans[0][0]) if busy else 0.0
            for busy, spans in zip(self.busy, self.spans, strict=True)
        ]

    @property
    def mean_bubble(self) -> float:
        return sum(self.bubble) / len(self.bubble)


def simulate(schedule: Schedule, costs: Costs | None = None) -> Simulation:
    """Replay a proven schedule (`check`), in time linear in its actions. Default costs: F = I = W = 1 a rank."""
    if costs is None:
        costs = Costs.even(len(schedule.rows), schedule.stages)
    assert costs.stages == schedule.stages, f"costs of {costs.stages} stages for a schedule of {schedule.stages}"
    replay = _Replay(schedule, costs)
    ready = list(range(len(schedule.rows)))
    while ready:
        replay.advance(ready.pop(), ready)
    replay.reduce_tied()
    return Simulation(replay.spans, max(replay.clock, default=0.0), replay.busy, replay.exposed, replay.peak)


class _Replay:
    def __init__(self, schedule: Schedule, costs: Costs) -> None:
        self.schedule, self.costs = schedule, costs
        ranks, stages = len(schedule.rows), schedule.stages
        self.clock, self.position = [0.0] * ranks, [0] * ranks
        self.busy, self.exposed = [0.0] * ranks, [0.0] * ranks
        self.held, self.peak = [0.0] * ranks, [0.0] * ranks
        self.spans: list[list[Span]] = [[] for _ in range(ranks)]
        self.duration = {
            "F": costs.forward,
            "I": costs.input_grad,
            "W": costs.weight_grad,
            "B": tuple(i + w for i, w in zip(costs.input_grad, costs.weight_grad, strict=True)),
            "REDUCE": costs.reduce,
        }
        # What an action adds to the memory held: F takes, I gives back a part, W the rest, B all.
        self.memory = {
            "F": costs.activation,
            "B": tuple(-units for units in costs.activation),
            "I": tuple(-(1 - costs.kept) * units for units in costs.activation),
            "W": tuple(-costs.kept * units for units in costs.activation),
            "REDUCE": (0.0,) * stages,
        }
        # (send's kind, stage * microbatches + m) -> when it was sent, and when it arrives
        self.sent: dict[tuple[str, int], tuple[float, float]] = {}
        self.waiting: dict[tuple[str, int], int] = {}
        self.free: dict[tuple[int, int, str], float] = {}  # channel -> when it can take the next message

    def advance(self, rank: int, ready: list[int]) -> None:
        """Run a row until it waits for a send that has not happened yet; append the ranks that it wakes."""
        row, clock, at = self.schedule.rows[rank], self.clock[rank], self.position[rank]
        spans, m_count = self.spans[rank], self.schedule.microbatches
        held, peak, busy = self.held[rank], self.peak[rank], self.busy[rank]
        while at < len(row):
            action = row[at]
            stage, kind, m = action
            if kind == "RECV_F" or kind == "RECV_B":
                key = (
                    ("SEND_F", (stage - 1) * m_count + m) if kind == "RECV_F" else ("SEND_B", (stage + 1) * m_count + m)
                )
                if key not in self.sent:
                    self.waiting[key] = rank
                    break
                sent, arrival = self.sent.pop(key)
                if arrival > clock:
                    if arrival > sent:
                        begin = max(clock, sent)
                        self.exposed[rank] += arrival - begin
                        spans.append((begin, arrival, action))
                    clock = arrival
            elif kind == "SEND_F" or kind == "SEND_B":
                key = (kind, stage * m_count + m)
                clock = self._send(rank, action, clock, key)
                if (waiter := self.waiting.pop(key, None)) is not None:
                    ready.append(waiter)
            else:
                duration = self.duration[kind][stage]
                held += self.memory[kind][stage]
                if held > peak:
                    peak = held
                if duration or kind != "REDUCE":
                    spans.append((clock, clock + duration, action))
                clock += duration
                busy += duration
            at += 1
        self.clock[rank], self.position[rank] = clock, at
        self.held[rank], self.peak[rank], self.busy[rank] = held, peak, busy

    def _send(self, rank: int, action: Action, clock: float, key: tuple[str, int]) -> float:
        """Put a message on its channel; returns when the sender goes on."""
        costs = self.costs
        if not costs.transfer:
            self.sent[key] = (clock, clock + costs.latency)
            return clock
        peer = action.stage + (1 if action.kind == "SEND_F" else -1)
        channel = (rank, self.schedule.rank_of(peer), action.kind)
        done = max(clock, self.free.get(channel, 0.0)) + costs.transfer
        self.free[channel] = done
        self.sent[key] = (clock, done + costs.latency)
        if costs.overlap:
            return clock
        self.spans[rank].append((clock, done, action))
        self.exposed[rank] += done - clock
        return done

    def reduce_tied(self) -> None:
        """The tied weights' gradients are added up between the first and the last stage when both are done."""
        first, last = self.schedule.rank_of(0), self.schedule.rank_of(self.schedule.stages - 1)
        if not self.costs.tied or first == last:
            return
        begin = max(self.clock[first], self.clock[last])
        for rank, stage in ((first, 0), (last, self.schedule.stages - 1)):
            self.spans[rank].append((begin, begin + self.costs.tied, Action(stage, "REDUCE")))
            self.busy[rank] += self.costs.tied
            self.clock[rank] = begin + self.costs.tied
