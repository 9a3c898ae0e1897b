"""The launcher looks at what the ranks write on their board, finds the one that is stuck, and names it."""

import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megapar.files import write_atomic
from megapar.launch.rank import Job
from megapar.trace.announcements import out_of_step
from megapar.trace.board import BEAT_S, Doing, Memory, open_memory

LOOK_S = 0.1
SILENT_S = 10 * BEAT_S  # without a heartbeat: stopped, or nothing of Python can run
STACKS_S = 1.5  # for the ranks that can to write their stacks
GROUP = re.compile(r" of ranks (\d+(?:, \d+)*)$")  # how the name of a collective ends
BOARD = ".board.json"  # in the run directory: where the board of a live run is


@contextmanager
def board_of(job: Job) -> Iterator[Memory | None]:
    """The board of a job's ranks, for as long as they run; None where the system has no such memory."""
    memory = Memory.create(job.ranks)
    if memory is None:
        yield None
        return
    try:
        with showing(job, memory):
            yield memory
    finally:
        memory.close()


@contextmanager
def showing(job: Job, memory: Memory) -> Iterator[None]:
    """Have `read_board` find a board by the run directory, for as long as this lasts."""
    if job.watchdog_s is None:
        yield
        return
    path, shown = Path(job.folder) / BOARD, {"path": memory.path, "pid": os.getpid(), "host": socket.gethostname()}
    write_atomic(path, json.dumps(shown) + "\n")
    try:
        yield
    finally:
        with suppress(OSError, ValueError):
            if json.loads(path.read_text(encoding="utf-8")) == shown:  # and not of ranks that were started again
                path.unlink()


def read_board(folder: Path) -> list[Doing]:
    """What each rank of a run is doing; empty where this machine has no board of it."""
    try:
        shown = json.loads((folder / BOARD).read_text(encoding="utf-8"))
        if shown["host"] != socket.gethostname():
            return []
        memory = open_memory(str(shown["path"]), write=False)
    except (OSError, ValueError, KeyError, TypeError):
        return []
    try:
        return [memory.read(rank) for rank in range(memory.ranks)]
    finally:
        memory.close()


@dataclass(frozen=True)
class Finding:
    """Ranks that the others wait for, and why."""

    culprits: list[Doing]
    reason: str
    waiting: list[Doing]


def state_of(pid: int) -> str:
    """A process's state as the kernel names it (R, S, D, T, Z, ...); empty where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def find(doing: list[Doing], now: float, state: Callable[[Doing], str] = lambda one: state_of(one.pid)) -> Finding:
    """Who is to blame when an operation takes too long. The first of these that there is: ranks that have not started;
    ranks without a heartbeat; ranks that wait for nobody; ranks of an operation that all of its ranks are in; all.

    state: of a rank's process, as `state_of`
    """
    if absent := [one for one in doing if not one.pid]:
        return _finding(absent, "it has begun no operation", doing)
    silent = [one for one in doing if now - one.beat > SILENT_S]
    if silent:
        stopped = all(state(one) in ("T", "t") for one in silent)
        return _finding(silent, "stopped by a signal" if stopped else "no heartbeat", doing)
    at_work = [one for one in doing if not one.waiting]
    if at_work:
        return _finding(at_work, "the others wait for it", doing)
    if met := [one for one in doing if _has_met(one, doing)]:
        return _finding(met, "all of its ranks are in it, and it does not end", doing)
    return _finding(doing, "all wait for each other: their operations differ", doing)


def _has_met(one: Doing, doing: list[Doing]) -> bool:
    """Whether all ranks of the operation that a rank waits in wait in it."""
    found = GROUP.search(one.operation)
    waiting = {other.rank for other in doing if (other.operation, other.within) == (one.operation, one.within)}
    return found is not None and waiting >= set(map(int, found[1].split(", ")))


def _finding(culprits: list[Doing], reason: str, doing: list[Doing]) -> Finding:
    return Finding(culprits, reason, [one for one in doing if one not in culprits])


class Watch:
    """Looks for a rank whose operation lasts longer than `job.watchdog_s`, and ends it; until all ranks are in a step,
    longer than `job.timeout_s`, if that is more. finding: the line about it"""

    def __init__(self, job: Job, memory: Memory | None) -> None:
        self.job, self.memory = job, memory
        self.finding: str | None = None
        self._over = threading.Event()

    @contextmanager
    def watching(self) -> Iterator["Watch"]:
        if self.memory is None or self.job.watchdog_s is None:
            yield self
            return
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._over.set()
            thread.join()

    def where(self, rank: int) -> str:
        """What a rank that has ended was doing, as the end of a line."""
        if self.memory is None or not (doing := self.memory.read(rank)).pid:
            return ""
        return f" in {doing.text}"

    def out_of_step(self) -> str:
        """What ranks are out of step in, if they are, as the begin of a line."""
        found = None if self.memory is None else out_of_step(self.memory, range(self.job.ranks))
        return f"{found}; " if found else ""

    def _watch(self) -> None:
        assert self.memory is not None and self.job.watchdog_s is not None
        looked = since = started = time.monotonic()
        before: set[tuple[int, int]] = set()
        while not self._over.wait(LOOK_S):
            now = time.monotonic()
            if now - looked > SILENT_S:  # we have been stopped ourselves, and so may they
                since = now
            looked = now
            doing = [self.memory.read(rank) for rank in range(self.job.ranks)]
            there = [one for one in doing if one.pid]
            absent = self.absent(doing, started)
            there += absent
            limit = self.job.watchdog_s
            if absent or not all(one.step for one in there):
                limit = max(limit, self.job.timeout_s)  # processes start, models are built, kernels compiled
            late = {(one.rank, one.count) for one in there if now - max(one.since, since) > limit}
            if late & before:  # the same operation at two looks
                self._stuck(there, now)
                return
            before = late

    def _stuck(self, doing: list[Doing], now: float) -> None:
        """Name who is stuck, have the stacks written, and end the run."""
        assert self.memory is not None
        finding = find(doing, now, self.state)
        self.ask(doing)
        deadline = now + STACKS_S
        while time.monotonic() < deadline and any(
            self.memory.has_asked(one.rank) for one in doing if now - one.beat < SILENT_S
        ):
            time.sleep(BEAT_S / 4)
        self.end(self.out_of_step() + describe(finding, now, self.job), finding.culprits)

    def absent(self, doing: list[Doing], started: float) -> list[Doing]:
        """Ranks that have begun no operation since the launcher started them."""
        return [replace(one, since=started) for one in doing if not one.pid and not one.count]

    def state(self, one: Doing) -> str:
        """Of a rank's process, as `state_of`."""
        return state_of(one.pid)

    def ask(self, doing: list[Doing]) -> None:
        """Have ranks write their stacks."""
        assert self.memory is not None
        for one in doing:
            self.memory.ask_for_stacks(one.rank)

    def end(self, line: str, culprits: list[Doing]) -> None:
        """Say who is stuck, and end them."""
        self.finding = line
        assert self.memory is not None
        there = [one for one in map(self.memory.read, range(self.job.ranks)) if one.pid]
        ended = [one for one in there if one.rank in [culprit.rank for culprit in culprits]] or there
        for one in ended:
            with suppress(ProcessLookupError):
                os.kill(one.pid, signal.SIGKILL)
        if not ended:  # nobody is there yet
            print(line, file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGTERM)


def describe(finding: Finding, now: float, job: Job) -> str:
    """A line that names the ranks that are stuck, what in, and who waits where."""

    def place(one: Doing) -> str:
        return one.text if one.pid else "its start-up"

    stuck = "; ".join(f"rank {one.rank} for {now - one.since:.1f} s in {place(one)}" for one in finding.culprits)
    waits: dict[str, list[int]] = {}
    for one in finding.waiting:
        waits.setdefault(one.text, []).append(one.rank)
    waiting = "".join(f"; {_ranks(ranks)} in {text}" for text, ranks in waits.items())
    return f"stuck: {stuck} ({finding.reason}){waiting}; Python stacks: {stacks(job, '*')}"


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]} waits" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} wait"


def stacks(job: Job, rank: object) -> Path:
    """The file in which a rank writes its Python stacks."""
    return Path(job.folder) / "logs" / f"stacks-{rank}.txt"


def table(doing: list[Doing], now: float) -> list[dict[str, Any]]:
    """A row for every rank. seconds: in the operation; silent_s: since the last heartbeat; both None before the rank
    is there. operations: begun so far."""
    return [
        {
            **{key: getattr(one, key) for key in ("rank", "pid", "step", "operation", "within", "waiting")},
            "text": one.text.removeprefix(f"step {one.step}, "),
            "seconds": round(now - one.since, 3) if one.pid else None,
            "silent_s": round(now - one.beat, 3) if one.pid else None,
            "operations": one.count,
        }
        for one in doing
    ]
