"""The protocol of kernels/comm as a specification that can be executed, and an explorer of all its executions.

A rank runs one epoch after another. An epoch is launches, each a few programs, and a program is a list of steps:

| step           | what it does                                                       |
|----------------|--------------------------------------------------------------------|
| set a flag     | in a peer's memory, to the epoch; never to less than it was        |
| await a flag   | of the own memory: go on once it is at least an epoch              |
| write          | one tile to a peer's memory                                        |
| read           | one tile of the own memory: it must be what its writer wrote in this epoch |

Programs that run beside each other, on one rank and on all, take their steps in every order. `explore` visits all the
states that they can get to and says what goes wrong in any: a tile that is read before it is written, or overwritten
before it is read; a flag that is taken back; ranks that wait for each other for ever. No state is visited twice by one
execution, since every step moves a program on: so an execution that never gets stuck ends.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

# ------------------------------------------------------------------------------------------------- steps and programs


class Cell(NamedTuple):
    """A word or a tile of a rank's memory. kind: begun, flag or tile; half: of a flag or a tile."""

    kind: str
    rank: int
    half: int
    number: int


class Step(NamedTuple):
    """does: set, await, write or read. part: of the protocol, for `Protocol.without`. value: an epoch, or a tile's
    (epoch, writer)."""

    does: str
    part: str
    cell: Cell
    value: int | tuple[int, int]


Program = list[Step]
Launches = list[list[Program]]  # each waits for the one before to be done; its programs run beside each other


@dataclass(frozen=True)
class Protocol:
    """The rules, and what is broken. without: parts of which no step is taken; any_epoch: parts that await any epoch;
    one_half: kinds of cells that epochs do not take turns in."""

    ranks: int
    without: frozenset[str] = frozenset()
    any_epoch: frozenset[str] = frozenset()
    one_half: frozenset[str] = frozenset()

    def cell(self, kind: str, rank: int, epoch: int, number: int) -> Cell:
        return Cell(kind, rank, 0 if kind in self.one_half else epoch % 2, number)

    def begin(self, me: int, epoch: int, tells: bool = True) -> Program:
        """Rule 1. tells: this is program 0 of its launch."""
        peers = range(self.ranks)
        telling = [Step("set", "begin tells", Cell("begun", peer, 0, me), epoch) for peer in peers]
        waiting = [self._await("begin waits", Cell("begun", me, 0, peer), epoch - 1) for peer in peers]
        return telling * tells + waiting

    def write(self, part: str, peer: int, me: int, epoch: int, tile: int) -> Step:
        return Step("write", part, self.cell("tile", peer, epoch, tile), (epoch, me))

    def post(self, part: str, peer: int, epoch: int, tile: int) -> Step:
        """Rule 2."""
        return Step("set", part, self.cell("flag", peer, epoch, tile), epoch)

    def await_and_read(self, part: str, me: int, writer: int, epoch: int, tile: int) -> Program:
        """Rule 3."""
        waiting = self._await(part, self.cell("flag", me, epoch, tile), epoch)
        return [waiting, Step("read", "reads", self.cell("tile", me, epoch, tile), (epoch, writer))]

    def _await(self, part: str, cell: Cell, epoch: int) -> Step:
        return Step("await", part, cell, min(epoch, 1) if part in self.any_epoch else epoch)


# ---------------------------------------------------------------------------------------------------------- operations
#
# What a rank does in an epoch. A tile's number is that of its flag, too.


def sums_to_all(protocol: Protocol, me: int, epoch: int) -> Launches:
    """A push of one tile to all; beside it, sums of all ranks' tiles."""
    every = range(protocol.ranks)
    push = protocol.begin(me, epoch)
    push += [protocol.write("push", peer, me, epoch, me) for peer in every]
    push += [protocol.post("push tells", peer, epoch, me) for peer in every]
    sums = [step for peer in every for step in protocol.await_and_read("reduce waits", me, peer, epoch, peer)]
    return [[push, sums]]


def sums_to_owner(protocol: Protocol, me: int, epoch: int, tiles: int = 1) -> Launches:
    """Products to owners, a program for each; beside them, sums of the own block's tiles."""
    every = range(protocol.ranks)
    products = [
        protocol.begin(me, epoch, tells=owner == 0)
        + [
            step
            for tile in range(me * tiles, (me + 1) * tiles)
            for step in (
                protocol.write("push", owner, me, epoch, tile),
                protocol.post("push tells", owner, epoch, tile),
            )
        ]
        for owner in every
    ]
    sums = [
        step
        for tile in range(tiles)
        for peer in every
        for step in protocol.await_and_read("reduce waits", me, peer, epoch, peer * tiles + tile)
    ]
    return [[*products, sums]]


def sums_of_two_shapes(protocol: Protocol, me: int, epoch: int) -> Launches:
    """Two tiles of a block in one epoch, one in the next: a flag is another rank's then."""
    return sums_to_owner(protocol, me, epoch, tiles=1 + epoch % 2)


def sums_to_owner_and_all(protocol: Protocol, me: int, epoch: int) -> Launches:
    """As `sums_to_owner`; the sums go to all, and are collected. Tiles of results come after those of summands."""
    (programs,) = sums_to_owner(protocol, me, epoch)
    every = range(protocol.ranks)
    programs[-1] += [protocol.write("share", peer, me, epoch, protocol.ranks + me) for peer in every]
    programs[-1] += [protocol.post("reduce tells", peer, epoch, protocol.ranks + me) for peer in every]
    collect = [
        step
        for owner in every
        for step in protocol.await_and_read("collect waits", me, owner, epoch, protocol.ranks + owner)
    ]
    return [programs, [collect]]


def sums_of_one_row(protocol: Protocol, me: int, epoch: int) -> Launches:
    """The same with fewer rows than ranks: rank 0 owns the only tile, the others only collect."""
    every = range(protocol.ranks)
    push = [
        *protocol.begin(me, epoch),
        protocol.write("push", 0, me, epoch, me),
        protocol.post("push tells", 0, epoch, me),
    ]
    sums = [step for peer in every for step in protocol.await_and_read("reduce waits", me, peer, epoch, peer)]
    sums += [protocol.write("share", peer, me, epoch, protocol.ranks) for peer in every]
    sums += [protocol.post("reduce tells", peer, epoch, protocol.ranks) for peer in every]
    collect = protocol.await_and_read("collect waits", me, 0, epoch, protocol.ranks)
    return [[push, sums if me == 0 else []], [collect]]


def gather(protocol: Protocol, me: int, epoch: int, tiles: int = 1, idle: bool = False) -> Launches:
    """Rows to all, a flag for every tile; beside it, the product of one tile after the other, the own ones first.

    idle: the last rank has no columns: it pushes, and reads nothing.
    """
    every = range(protocol.ranks)
    push = protocol.begin(me, epoch)
    for tile in range(me * tiles, (me + 1) * tiles):
        push += [protocol.write("push", peer, me, epoch, tile) for peer in every]
        push += [protocol.post("push tells", peer, epoch, tile) for peer in every]
    product: Program = []
    for number in range(protocol.ranks * tiles if not (idle and me == protocol.ranks - 1) else 0):
        peer, tile = (number // tiles + me) % protocol.ranks, number % tiles
        product += protocol.await_and_read("product waits", me, peer, epoch, peer * tiles + tile)
    return [[push, product]]


def gather_idle(protocol: Protocol, me: int, epoch: int) -> Launches:
    return gather(protocol, me, epoch, idle=True)


def gather_of_two_shapes(protocol: Protocol, me: int, epoch: int) -> Launches:
    """As `sums_of_two_shapes`."""
    return gather(protocol, me, epoch, tiles=1 + epoch % 2, idle=True)


OPERATIONS: dict[str, Callable[[Protocol, int, int], Launches]] = {
    "sums to all": sums_to_all,
    "sums to owner": sums_to_owner,
    "sums to owner, two shapes": sums_of_two_shapes,
    "sums to owner, and to all": sums_to_owner_and_all,
    "sums of one row": sums_of_one_row,
    "gather": gather,
    "gather, idle": gather_idle,
    "gather, idle, two shapes": gather_of_two_shapes,
}


# ------------------------------------------------------------------------------------------------------------ explorer

Place = tuple[int, tuple[int, ...]]  # of a rank: the launch that it is at, and how far each of its programs is
State = tuple[tuple[Place, ...], tuple[Any, ...]]  # every rank's place, every cell's value


@dataclass(frozen=True)
class Verdict:
    """wrong: what can go wrong, "" for nothing; states: how many were visited until that was known."""

    wrong: str
    states: int


def explore(protocol: Protocol, operation: str, epochs: int, reduced: bool = False) -> Verdict:
    """What can go wrong in so many epochs, in any order of steps.

    reduced: of the orders that differ only in when flags are set and seen, look at one. A flag of one writer, which
    only grows, changes nothing but what can be awaited, and that for good. So it may as well be set, and an await that
    is satisfied passed, before anything else is done; what is left to order is writes and reads.
    """
    execution = _Execution(protocol, operation, epochs, reduced)
    seen, unvisited = {execution.start}, [execution.start]
    while unvisited:
        state = unvisited.pop()
        following = []
        for step, found, after in execution.moves(state):
            wrong = _wrong(step, found)
            if wrong:
                return Verdict(f"{wrong}: {step}", len(seen))
            following.append(after)
        if not following and not execution.is_done(state):
            return Verdict("deadlock", len(seen))
        for after in following:
            if after not in seen:
                seen.add(after)
                unvisited.append(after)
    return Verdict("", len(seen))


def _wrong(step: Step, found: Any) -> str:
    if step.does == "set" and found > step.value:
        return "flag taken back"
    if step.does == "read" and found != step.value:
        return "read before it is written" if found < step.value else "overwritten before it is read"
    return ""


class _Execution:
    """What every rank does in all epochs, and the moves from one state to the next."""

    def __init__(self, protocol: Protocol, operation: str, epochs: int, reduced: bool) -> None:
        self.ranks = [
            [
                [[step for step in program if step.part not in protocol.without] for program in launch]
                for epoch in range(1, epochs + 1)
                for launch in OPERATIONS[operation](protocol, me, epoch)
            ]
            for me in range(protocol.ranks)
        ]
        writers: dict[Cell, set[int]] = {}
        for me, launches in enumerate(self.ranks):
            for step in (step for launch in launches for program in launch for step in program):
                writers.setdefault(step.cell, set()).update([me] if step.does in ("set", "write") else [])
        self.address = {cell: at for at, cell in enumerate(writers)}
        self.first = {cell for cell in writers if reduced and cell.kind != "tile" and len(writers[cell]) < 2}
        memory = tuple((0, 0) if cell.kind == "tile" else 0 for cell in writers)
        self.start: State = (tuple(self._at(me, 0, None) for me in range(protocol.ranks)), memory)

    def _at(self, me: int, launch: int, counters: tuple[int, ...] | None) -> Place:
        """The place, or the beginning of the next launch that has anything to do."""
        while launch < len(self.ranks[me]):
            ends = tuple(len(program) for program in self.ranks[me][launch])
            counters = counters or (0,) * len(ends)
            if counters != ends:
                return launch, counters
            launch, counters = launch + 1, None
        return launch, ()

    def is_done(self, state: State) -> bool:
        return all(launch == len(self.ranks[me]) for me, (launch, _) in enumerate(state[0]))

    def moves(self, state: State) -> list[tuple[Step, Any, State]]:
        """(step, what its cell held, state after it) of every program that can go on, or of one that may as well."""
        places, memory = state
        found = []
        for me, (launch, counters) in enumerate(places):
            for which, counter in enumerate(counters):
                program = self.ranks[me][launch][which]
                if counter == len(program):
                    continue
                step = program[counter]
                at = self.address[step.cell]
                if step.does == "await" and memory[at] < step.value:
                    continue
                after = memory
                if step.does in ("set", "write"):
                    after = (*memory[:at], step.value, *memory[at + 1 :])
                place = self._at(me, launch, (*counters[:which], counter + 1, *counters[which + 1 :]))
                move = step, memory[at], ((*places[:me], place, *places[me + 1 :]), after)
                if step.cell in self.first:
                    return [move]
                found.append(move)
        return found
