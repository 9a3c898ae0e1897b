"""A process on each host that watches the ranks which torchrun or srun has started there, as our launcher does its own.

The first rank of a host starts it. Every rank there ties itself to it by a socket, which the kernel closes when the
rank ends, however that comes. The guard owns the board: a page for every rank of the run. Guards of other hosts
tell that of rank 0's host what their ranks do, so one of them sees all. No torch here, and nothing that ranks compute.
"""

import asyncio
import base64
import hmac
import json
import os
import secrets
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megapar.launch.machine import out_of_memory_kills, who_kills
from megapar.launch.rank import Job
from megapar.launch.watch import SILENT_S, STACKS_S, Watch, showing, state_of
from megapar.trace.board import BEAT_S, PAGE, Doing, Memory

TIE_S = 20.0  # until a guard answers
TELL_S = 0.5  # between what guards tell each other
ALONE_S = 60.0  # until the first rank has come
END_S = 2.0  # the others have to end by themselves when a rank has died
SAID_S = 5.0  # the same when it said itself why
ZOMBIE_S = 0.3  # for who started a rank to take note of its end
RECORDS_AT = 1024  # bytes of a page: announcements, see `megapar.trace.announcements`
IGNORED = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2]
LINE = 1 << 24  # bytes of a message, at most
Message = dict[str, Any]


@dataclass(frozen=True)
class Address:
    """Where a guard listens. name: for ranks of its host, an abstract socket; host, port: for other hosts' guards; 0:
    there are none. token: what they must know."""

    name: str
    host: str
    port: int
    token: str


class Tie:
    """A rank's end of the socket between it and its host's guard."""

    def __init__(self, connection: socket.socket, board: str) -> None:
        self.connection, self.board = connection, board

    def end(self, how: str) -> None:
        """How this rank ends: `done`, or `said`, when it has said itself what went wrong."""
        with suppress(OSError):
            self.connection.sendall(_line({"end": how}))


def start(hosts: int, host: str) -> bytes:
    """Start this host's guard. Returns its address as a line, which is empty where it could not start.

    host: the name of this one, by which others reach it
    """
    words = [sys.executable, "-m", "megapar.launch.guard", str(hosts), host]
    try:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    except OSError:
        return b""
    assert process.stdout is not None
    with process.stdout as pipe:
        return pipe.readline() if select.select([pipe], [], [], TIE_S)[0] else b""


def address(line: bytes) -> Address:
    """Of what `start` returned. Raises OSError for an empty line."""
    if not line:
        raise OSError("it could not start")
    return Address(**json.loads(line))


def tie(mine: Address, first: Address, rank: int, job: Job) -> Tie:
    """Tie this rank to its host's guard. first: that of rank 0's host. Raises OSError where none answers."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(TIE_S)
    connection.connect("\0" + mine.name)
    if _user(connection) != os.getuid():
        raise PermissionError(f"{mine.name}: another user's")
    shown = replace(job, config="", schedules={}, env={})
    hello = {"rank": rank, "pid": os.getpid(), "parent": os.getppid(), "job": asdict(shown), "first": asdict(first)}
    connection.sendall(_line(hello))
    with connection.makefile("rb") as answers:
        board = json.loads(answers.readline())["board"]
    connection.settimeout(None)
    return Tie(connection, board)


def _line(message: Message) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _user(connection: Any) -> int:
    """Of the process at the other end of a socket of this host."""
    _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(user)


class Guard:
    """Of one host."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.loop = asyncio.get_running_loop()
        self.ranks: dict[int, int] = {}  # processes of this host's ranks
        self.links: dict[asyncio.StreamWriter, set[int]] = {}  # to other hosts' guards, with their ranks
        self.states: dict[int, str] = {}  # of other hosts' processes
        self.over = asyncio.Event()
        self.ending = False
        self.parent = 0
        self.job: Job | None = None
        self.memory: Memory | None = None
        self.watch: Watch | None = None
        self.up: asyncio.StreamWriter | None = None
        self.killed_before = out_of_memory_kills()
        self.looking: asyncio.Task[None] | None = None
        self.tasks: list[asyncio.Task[None]] = []

    async def tied(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """For as long as a rank of this host lives."""
        if _user(writer.get_extra_info("socket")) != os.getuid():
            writer.close()
            return
        hello = await _read(reader)
        if hello is None:
            return
        rank = hello["rank"]
        self.ranks[rank], self.parent = hello["pid"], hello["parent"]
        if self.memory is None:
            await self._begin(Job(**hello["job"]), Address(**hello["first"]))
        assert self.memory is not None
        writer.write(_line({"board": self.memory.path}))
        how = ""
        while (message := await _read(reader)) is not None:
            how = message["end"]
        writer.close()
        pid = self.ranks.pop(rank)
        if not how:
            await self._died(rank, pid)
        elif how == "said":
            self._end_all(SAID_S)
        self.memory.clear(rank)
        if not self.ranks:
            self.over.set()

    async def _begin(self, job: Job, first: Address) -> None:
        self.memory = Memory.create(job.ranks)
        assert self.memory is not None
        self.job = job
        self.watch = _Watch(job, self.memory, self)
        if first == self.address:
            self.looking = asyncio.create_task(self._look())
        else:
            self.tasks.append(asyncio.create_task(self._tell(first)))

    async def _look(self) -> None:
        """On rank 0's host: look for who is stuck."""
        assert self.job is not None and self.memory is not None and self.watch is not None
        with showing(self.job, self.memory), self.watch.watching():
            while not self.over.is_set():
                self._send({"alive": True})
                await asyncio.sleep(TELL_S)
        self._send({"over": True})

    async def linked(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """On rank 0's host: what another host's guard tells."""
        hello = await _read(reader)
        if hello is None or not hmac.compare_digest(str(hello.get("token")).encode(), self.address.token.encode()):
            writer.close()
            return
        ranks = self.links[writer] = set(hello["ranks"])
        while (message := await _read(reader)) is not None:
            self._told(message, ranks)
        del self.links[writer]
        writer.close()
        if self.memory is None:
            return
        left = [rank for rank in ranks if self.memory.read(rank).pid]
        if left and not self.ending and self.ranks:
            self._say(f"ranks {_listed(left)} are no longer watched: the guard of {hello['host']} has gone")
        for rank in left:
            self.memory.clear(rank)

    def _told(self, message: Message, ranks: set[int]) -> None:
        if self.memory is None:
            return
        now = time.monotonic()
        for name, page in message.get("pages", {}).items():
            rank = int(name)
            ranks.add(rank)
            self.states[rank] = page.pop("state")
            since, beat = now - page.pop("seconds"), now - page.pop("silent_s")
            self.memory.show(Doing(rank=rank, since=since, beat=beat, **page))
        for name, records in message.get("records", {}).items():
            at = int(name) * PAGE
            self.memory.map[at + RECORDS_AT : at + PAGE] = base64.b64decode(records)
            self.memory.stacks_written(int(name))
        for rank in message.get("gone", []):
            self.memory.clear(rank)
        if "line" in message:
            self._say(message["line"])
        if "end" in message:
            self._end_all(message["end"])

    async def _tell(self, first: Address) -> None:
        """On another host: tell the guard of rank 0's what the ranks here do, and do what it says."""
        assert self.job is not None and self.memory is not None
        try:
            reader, up = await asyncio.wait_for(asyncio.open_connection(first.host, first.port, limit=LINE), TIE_S)
        except (OSError, TimeoutError) as error:
            where = f"{first.host}:{first.port}"
            self._say(
                f"ranks {_listed(self.ranks)} are not watched: rank 0's guard at {where} can't be reached ({error})"
            )
            return
        self.up = up
        up.write(_line({"token": first.token, "host": self.address.host, "ranks": list(self.ranks)}))
        self.tasks.append(asyncio.create_task(self._tell_pages(up)))
        limit = max(self.job.watchdog_s or 0.0, SILENT_S) + SILENT_S
        while True:
            try:
                message = await asyncio.wait_for(_read(reader), limit)
            except TimeoutError:
                self._say(f"stuck: {first.host}, the host of rank 0, has said nothing for {limit:.0f} s")
                self._end_here(0.0)
                return
            if message is None or "over" in message:
                self.up = None
                if message is None and self.ranks and not self.ending:
                    self._say(f"ranks {_listed(self.ranks)} are no longer watched: rank 0's guard has gone")
                return
            for rank in message.get("kill", []):
                self._kill(rank)
            if "end" in message:
                self._end_here(message["end"])
            if "look" in message:
                self.tasks.append(asyncio.create_task(self._records(up)))

    async def _tell_pages(self, up: asyncio.StreamWriter) -> None:
        assert self.memory is not None
        told: set[int] = set()
        while self.up is not None and not up.is_closing():
            now = time.monotonic()
            pages = {}
            for doing in map(self.memory.read, self.ranks):
                if doing.pid:
                    page = {**asdict(doing), "state": state_of(doing.pid)}
                    page |= {"seconds": now - page.pop("since"), "silent_s": now - page.pop("beat")}
                    pages[page.pop("rank")] = page
            up.write(_line({"pages": pages, "gone": list(told - pages.keys())}))
            told = set(pages)
            await asyncio.sleep(TELL_S)

    async def _records(self, up: asyncio.StreamWriter) -> None:
        """Have the stacks of this host's ranks written, and send what they have announced."""
        assert self.memory is not None
        ranks = list(self.ranks)
        for rank in ranks:
            self.memory.ask_for_stacks(rank)
        deadline = time.monotonic() + 0.8 * STACKS_S
        while time.monotonic() < deadline and any(map(self.memory.has_asked, ranks)):
            await asyncio.sleep(BEAT_S / 4)
        pages = {rank: bytes(self.memory.map[rank * PAGE + RECORDS_AT : (rank + 1) * PAGE]) for rank in ranks}
        up.write(_line({"records": {rank: base64.b64encode(page).decode() for rank, page in pages.items()}}))

    async def _died(self, rank: int, pid: int) -> None:
        """A rank has ended without a word: say what it was doing, and end the others."""
        how = await _ended_by(pid)
        if self.ending or (self.parent > 1 and not state_of(self.parent)):
            return
        assert self.watch is not None and self.job is not None
        hint = who_kills(self.killed_before, out_of_memory_kills()) if how == "SIGKILL" else ""
        ended = f"ended by {how}{hint}" if how.startswith("SIG") else how
        line = f"rank {rank} failed: {ended}{self.watch.where(rank)}; logs: {self.job.log(rank)}"
        self._say(self.watch.out_of_step() + line)
        self._end_all(END_S)

    def found(self, line: str, ranks: Iterable[int]) -> None:
        """On rank 0's host: ranks are stuck, and are to be ended; then all others."""
        self._say(line)
        for rank in ranks:
            self._kill(rank)
        self._send({"kill": list(ranks)})
        self._end_all(END_S)

    def look(self) -> None:
        """Have other hosts send what is needed to name who is stuck."""
        self._send({"look": True})

    def _end_all(self, seconds: float) -> None:
        """End all ranks on all hosts, if they have not ended by then."""
        if self.up is not None:
            self.up.write(_line({"end": seconds}))
        self._send({"end": seconds})
        self._end_here(seconds)

    def _end_here(self, seconds: float) -> None:
        self.ending = True

        def kill() -> None:
            for rank in list(self.ranks):
                self._kill(rank)

        self.loop.call_later(seconds, kill)

    def _kill(self, rank: int) -> None:
        """A rank that is tied to this guard has not ended, so its number is its own."""
        if rank in self.ranks:
            self.ending = True
            with suppress(ProcessLookupError):
                os.kill(self.ranks[rank], signal.SIGKILL)

    def _send(self, message: Message) -> None:
        for writer in self.links:
            if not writer.is_closing() and writer.transport.get_write_buffer_size() < LINE:
                writer.write(_line(message))

    def _say(self, line: str) -> None:
        """On this host's terminal and on that of rank 0's."""
        with suppress(OSError):
            print(line, file=sys.stderr, flush=True)
        if self.up is not None:
            self.up.write(_line({"line": line}))


class _Watch(Watch):
    """Of all hosts' ranks."""

    def __init__(self, job: Job, memory: Memory, guard: Guard) -> None:
        super().__init__(job, memory)
        self.guard = guard

    def absent(self, doing: list[Doing], started: float) -> list[Doing]:
        """None: hosts whose guards can't be reached have ranks, too, and others wait for each other at the store."""
        return []

    def state(self, one: Doing) -> str:
        return self.guard.states.get(one.rank) or super().state(one)

    def ask(self, doing: list[Doing]) -> None:
        super().ask(doing)
        self.guard.loop.call_soon_threadsafe(self.guard.look)

    def end(self, line: str, culprits: list[Doing]) -> None:
        self.guard.loop.call_soon_threadsafe(self.guard.found, line, [one.rank for one in culprits])


async def _read(reader: asyncio.StreamReader) -> Message | None:
    """The next message; None at the end, however it comes."""
    try:
        line = await reader.readline()
        message = json.loads(line) if line.endswith(b"\n") else None
    except (OSError, ValueError):
        return None
    return message if isinstance(message, dict) else None


async def _ended_by(pid: int) -> str:
    """What ended a process: the name of a signal, or an exit code, as far as the kernel still tells."""
    deadline = time.monotonic() + ZOMBIE_S
    while time.monotonic() < deadline:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            break
        if fields[0] == "Z":
            status = int(fields[49])
            return signal.Signals(status & 127).name if status & 127 else f"exit code {status >> 8}"
        await asyncio.sleep(0.002)
    return "ended, by what is not known"


def _listed(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(ranks)))


async def main(hosts: int, host: str) -> None:
    name, token = f"megapar-guard-{secrets.token_hex(8)}", secrets.token_hex(16)
    guard = Guard(Address(name, host, 0, token))
    await asyncio.start_unix_server(guard.tied, "\0" + name, limit=LINE)
    if hosts > 1:
        both = socket.has_dualstack_ipv6()
        listening = socket.create_server(
            ("", 0), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both
        )
        await asyncio.start_server(guard.linked, sock=listening, limit=LINE)
        guard.address = replace(guard.address, port=listening.getsockname()[1])
    print(json.dumps(asdict(guard.address)), flush=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    guard.loop.call_later(ALONE_S, lambda: None if guard.memory is not None else guard.over.set())
    await guard.over.wait()
    if guard.looking is not None:
        await guard.looking
    await asyncio.sleep(TELL_S)  # for the last word to other hosts
    os._exit(0)  # there may be others' sockets, which are of no use any more


if __name__ == "__main__":
    for ignored in IGNORED:
        signal.signal(ignored, signal.SIG_IGN)
    asyncio.run(main(int(sys.argv[1]), sys.argv[2]))
