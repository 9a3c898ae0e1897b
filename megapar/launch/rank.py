"""One rank: its output goes to its log, it joins the process group, calls the entry, and reports why it failed."""

import ctypes
import faulthandler
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from megapar.config.errors import UserError
from megapar.config.file import loads
from megapar.console import TYPED, set_console, set_typed
from megapar.launch.failure import STOPPED
from megapar.launch.machine import keep_freed_memory, spare_garbage_collector
from megapar.launch.situation import WORKER
from megapar.redact import redacted
from megapar.schedule.build import hand_over
from megapar.stop import StopRequest, in_time, set_stop_request, stop_request
from megapar.trace.board import Board, board, open_memory, set_board

# What gloo, NCCL and the store say in a rank whose peer has gone. Such a rank is a victim and not the cause.
LOST_PEER = re.compile(
    r"closed by peer|reset by peer|broken pipe|connection refused|socket closed|timed out waiting|socket timeout"
    r"|remote process exited|wait timeout|communicator was aborted|heartbeat|failed to (recv|send)|end of file",
    re.IGNORECASE,
)
ONE_LINE = ("user", "rollback")  # kinds of reports that are said without a traceback
STORE_DELAY_S = 1.0  # rank 0 may serve the store: the others ask there whether their line was said
ASKED_WITHIN_S = 0.3  # a launcher that gets the signal of this rank's, too, has asked the ranks to stop
VICTIM_DELAY_S = 1.0  # a victim waits before it exits, so that the launcher sees the culprit first


@dataclass(frozen=True)
class Job:
    """What each rank of a run needs to know; goes to the ranks by pickle or as JSON."""

    kind: str  # "module:Class" of the configuration
    config: str  # the resolved configuration as YAML
    entry: str  # "module:function", called as function(config, rank, world_size)
    folder: str  # the run directory; logs go to its logs/
    device: str  # cpu: gloo, cuda: nccl
    timeout_s: float  # of a collective
    ranks: int  # of all machines together
    log_name: str = "rank"  # logs/LOG_NAME-N.log
    threads: int = 1
    quiet: bool = False  # nothing on the terminal, as when several runs share it
    reports: str | None = None  # folder where a failed rank says why, and the launcher that all are to stop
    scratch: tuple[str, ...] = ()  # folders of the launcher, which ranks remove if it is killed
    env: dict[str, str] = field(default_factory=dict)  # set in a rank where not set yet
    schedules: dict[str, str] = field(default_factory=dict)  # found by a search, see `megapar.schedule.build`
    typed: bool = False  # rank 0 reads what the launcher's standard input gives, see `megapar.console.typed`
    stopping: str = "stopping after this step, with a checkpoint; Ctrl-C again: at once\n"  # said at the first Ctrl-C
    ignored: tuple[str, ...] = ()  # names of signals that the launcher was started with ignored, or minds for all
    grace_s: float | None = None  # from a request to stop until the ranks are ended; None: Ctrl-C alone asks
    stop_at: float | None = None  # of the launcher's monotonic clock: when the ranks are asked to stop
    watchdog_s: float | None = None  # an operation that takes longer is stuck; None: no limit
    copies: str | None = None  # the folder of copies in this host's memory, see `megapar.checkpoint.hosts`
    board: str | None = None  # the memory in which the ranks write what they do, see `megapar.trace.board`

    def log(self, rank: int) -> Path:
        """The log of a rank."""
        return Path(self.folder) / "logs" / f"{self.log_name}-{rank}.log"


@dataclass(frozen=True)
class Report:
    """Why a rank failed."""

    rank: int
    kind: (
        str  # user: something a user can mend; rollback: the run goes on from its newest checkpoint if it may restart;
    )
    # error: its own failure; victim: a peer had gone
    line: str
    traceback: str
    time: float


def run(
    job: Job, rank: int, world_size: int, store: Any = None, ends: Callable[[str], None] = lambda how: None
) -> None:
    """Run a job's entry as one rank. On a failure write its report and exit: 2 for a UserError, 1 for anything else.

    store: a torch.distributed store to meet over; None: the one that the environment names
    ends: told how the rank ends, right before: `done`, or `said`, when it has said itself what went wrong
    """
    os.environ[WORKER] = "1"
    keep_freed_memory()
    for name, value in job.env.items():
        os.environ.setdefault(name, value)
    terminal = redirect_output(job.log(rank))
    set_console(terminal if rank == 0 and not job.quiet else None)
    set_stop_request(StopRequest(Path(job.reports) if job.reports is not None else None, job.stop_at))
    write_board(job, rank)
    mind_signals(job)
    if job.typed and rank == 0:
        set_typed(os.open(Path(str(job.reports)) / TYPED, os.O_RDONLY))
    try:
        _run_entry(job, rank, world_size, store)
        board().end()
        ends("done")
        if job.reports is None and stop_request().answered():
            _exit(0 if _would_be_started_again() else STOPPED)
    except KeyboardInterrupt:
        ends("said")
        _exit(130)
    except BaseException as error:
        code = _fail(job, rank, error, terminal, store)
        ends("said")
        # Not through the interpreter's exit: tearing down a process group whose peers hang may never return.
        _exit(code)
    for stream in (sys.stdout, sys.stderr, terminal):
        stream.flush()


def _would_be_started_again() -> bool:
    """Whether torchrun takes any exit code but 0 for a failure, after which it starts all ranks once more."""
    count, most = (int(os.environ.get(f"TORCHELASTIC_{name}", "0")) for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    return count < most


def run_elastic(job: Job) -> None:
    """The function that torch elastic calls in each of its processes."""
    die_with_parent(job.scratch)
    # Ctrl-C reaches every process of the terminal: the launcher says what happens then, and tells the ranks.
    signal.signal(signal.SIGINT, signal.SIG_IGN if "SIGINT" in job.ignored else signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which the fork server ignores, and `mind_signals` takes
    run(job, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


def die_with_parent(scratch: Sequence[str] = ()) -> None:
    """End this process when the one that started it is gone, however it went; and remove the folders it would have.

    The kernel's parent-death signal does not help: a rank's parent is the fork server, which outlives the launcher
    as long as a rank lives. The launcher's end of this pipe closes with the launcher.
    """
    from multiprocessing import connection, parent_process

    parent = parent_process()
    if parent is None:
        return
    sentinel = parent.sentinel

    def watch() -> None:
        connection.wait([sentinel])
        for folder in scratch:
            shutil.rmtree(folder, ignore_errors=True)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="die-with-parent", daemon=True).start()


def redirect_output(log: Path) -> TextIO:
    """Send file descriptors 1 and 2, so the output of libraries too, to a log. Returns the former standard output."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    terminal = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8", errors="replace")
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8", errors="replace")
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="backslashreplace")
    faulthandler.enable(all_threads=True)
    return terminal


def write_board(job: Job, rank: int) -> None:
    """Write what this rank does where the launcher looks, and give it heartbeats."""
    if job.board is None:
        return
    try:
        own = Board(open_memory(job.board), rank)
    except OSError as error:
        print(f"rank {rank} is not watched: its board can't be opened ({error})", file=sys.stderr, flush=True)
        return
    set_board(own)
    own.at_step(0)
    own.live(str(Path(job.folder) / "logs" / f"stacks-{rank}.txt"))


def mind_signals(job: Job) -> None:
    """From now on a thread minds this rank's signals, which it can while the rank is in a library's call.

    SIGTERM ends it at once, with its Python stack in the log, unless the run is asked to stop: a scheduler may send a
    signal to every process, also to those whose launcher says when to stop. SIGUSR1 and SIGUSR2 are the launcher's.
    Without one, each of the three asks all ranks to stop, and ends this one at the second time or `job.grace_s` later.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    taken = [signal.SIGTERM]
    if job.grace_s is not None:
        taken += [signal.SIGUSR1, signal.SIGUSR2]
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    for one in taken:
        signal.signal(one, lambda number, frame: None)  # so that it reaches the pipe, and nothing else
    threading.Thread(target=_mind, args=(job, read), name="signals", daemon=True).start()


def _mind(job: Job, pipe: int) -> None:
    request = stop_request()
    while number := os.read(pipe, 1):
        launched, by = job.reports is not None, number[0]
        if by not in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            continue
        if launched:
            if by == signal.SIGTERM and (not _asked_within(request, ASKED_WITHIN_S) or request.over()):
                _end_by(by)
        elif job.grace_s is None or request.here.is_set():
            _end_by(by)
        else:
            request.here.set()
            in_time(job.grace_s, partial(_end_by, by))


def _asked_within(request: StopRequest, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not request.asked():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _end_by(number: int) -> None:
    """End this process by a signal as if nobody minded it; its Python stack goes to the log."""
    faulthandler.dump_traceback(2, all_threads=True)
    libc = ctypes.CDLL(None)  # signal.signal is for the main thread alone
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal(number, None)
    os.kill(os.getpid(), number)
    time.sleep(1.0)
    os._exit(128 + number)


def name_of(thing: type) -> str:
    """The "module:name" that `load_named` turns back into a class."""
    return f"{thing.__module__}:{thing.__qualname__}"


def load_named(name: str) -> Any:
    """The function or class named by "module:name"."""
    module, _, member = name.partition(":")
    return getattr(importlib.import_module(module), member)


def is_lost_peer(error: BaseException) -> bool:
    """Whether the error only reports a lost peer."""
    if isinstance(error, UserError) or not isinstance(error, RuntimeError | OSError):
        return False
    return bool(LOST_PEER.search(str(error)))


def read_reports(folder: str | Path) -> list[Report]:
    """The reports of failed ranks, the likeliest cause first: a user's mistake or an own failure before victims."""
    found = [Report(**json.loads(path.read_text(encoding="utf-8"))) for path in Path(folder).glob("report-*.json")]
    return sorted(found, key=lambda report: (report.kind == "victim", report.time))


def _run_entry(job: Job, rank: int, world_size: int, store: Any) -> None:
    import torch
    import torch.distributed as dist

    from megapar.checkpoint.hosts import set_copies_folder

    torch.set_num_threads(job.threads)
    config: Any = loads(load_named(job.kind), job.config)
    if job.device == "cuda":
        # The default of 8 is for streams that never wait for each other's: a rank has one of NCCL's for every channel
        # and peer, and a receive at the head of a queue would hold up computation behind it. 32 is the most there is.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    hand_over(job.schedules)
    set_copies_folder(job.copies)
    entry: Callable[..., Any] = load_named(job.entry)
    spare_garbage_collector()
    if world_size == 1:
        entry(config, rank, world_size)
        return
    # No device_id: bound to a device, NCCL would run a group's transfers to all peers one after another, and a receive
    # posted ahead would hold up the sends behind it. (What it does to those of one pair: `megapar.mesh.CHANNELS`.)
    backend = "nccl" if job.device == "cuda" else "gloo"
    meet: dict[str, Any] = {"rank": rank, "world_size": world_size, "store": store} if store is not None else {}
    with board().doing("meeting the other ranks", waiting=True):
        dist.init_process_group(backend, timeout=timedelta(seconds=job.timeout_s), **meet)
    entry(config, rank, world_size)
    if dist.is_initialized():
        dist.destroy_process_group()


def _fail(job: Job, rank: int, error: BaseException, terminal: TextIO, store: Any) -> int:
    """Write what happened to the report and to the log, or to the terminal; returns the exit code.

    The report first, and everything where it still can be: on a full disk the cause must not get lost.
    """
    own = getattr(error, "kind", "user")  # of UserError: what becomes of the run
    kind = own if isinstance(error, UserError) else "victim" if is_lost_peer(error) else "error"
    text = "".join(traceback.format_exception(error))
    line = str(error) if kind in ONE_LINE else one_line(error)
    line, text = redacted(line), redacted(text)
    report = Report(rank, kind, line, text, time.time())
    shown = failure_text(report, job) if kind != "victim" else f"rank {rank} lost its peer; log: {job.log(rank)}"
    # Started by torchrun or srun, nothing else will show it.
    silent = _reported(job, report) if job.reports is not None else kind in ONE_LINE and _said(store, shown)
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - what is still buffered would fail again at every flush
    if not silent:
        with suppress(OSError):
            print(shown, file=terminal, flush=True)
    if kind == "victim":
        time.sleep(VICTIM_DELAY_S)
    elif kind in ONE_LINE and store is not None and rank == 0:
        time.sleep(STORE_DELAY_S)
    return 2 if kind == "user" else 1


def _reported(job: Job, report: Report) -> bool:
    """Write a report for the launcher, which shows it; whether that could be done."""
    path = Path(str(job.reports)) / f"report-{report.rank}.json"
    try:
        path.with_suffix(".tmp").write_text(json.dumps(report.__dict__), encoding="utf-8")
        os.replace(path.with_suffix(".tmp"), path)
    except OSError:
        return False
    return True


def _said(store: Any, line: str) -> bool:
    """Whether another rank has said this line already: what all ranks find alike is shown once."""
    try:
        return store.add(f"said/{hashlib.sha256(line.encode()).hexdigest()}", 1) > 1
    except Exception:  # the store has gone: better twice than not at all
        return False


def one_line(error: BaseException) -> str:
    """An exception in one line, with the operation it came from where that is noted (see `Timeline.span`)."""
    line = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    notes = getattr(error, "__notes__", [])
    return ", ".join([line, *notes[:2]])


def failure_text(report: Report, job: Job) -> str:
    """What the terminal shows of a failure: the traceback, then one line; of a user's mistake that line alone."""
    if report.kind in ONE_LINE:
        return report.line
    return f"{report.traceback.rstrip()}\nrank {report.rank} failed: {report.line}; logs: {job.log(report.rank)}"


def _exit(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)
