"""All ranks on this machine, through torch elastic."""

import errno
import logging
import multiprocessing
import multiprocessing.util
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

from megapar.config.errors import UserError
from megapar.console import TYPED
from megapar.kernels import INTERPRET
from megapar.launch.copies import removed_if_killed
from megapar.launch.failure import GoingOn, RankFailure, Stopped
from megapar.launch.machine import allow_open_files, out_of_memory_kills, threads_per_rank, who_kills
from megapar.launch.rank import Job, Report, failure_text, read_reports, run_elastic
from megapar.launch.signals import ENDING, Signals, kept
from megapar.launch.watch import Watch, board_of
from megapar.stop import STOPPING, StopRequest

# Ranks of one machine meet over the loopback, whatever the host's name resolves to.
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}


def start_fork_server(ranks: int = 1) -> None:
    """Start importing torch in the fork server, so that it is ready when the ranks are to be started.

    Returns at once. Forked ranks share that one import: eight start in a second or two instead of ten.
    """
    if multiprocessing.get_start_method(allow_none=True) not in (None, *multiprocessing.get_all_start_methods()):
        # joblib's workers have a start method of their own, which children inherit by name and do not know.
        multiprocessing.set_start_method("forkserver", force=True)
    multiprocessing.set_forkserver_preload(["megapar.launch.preload"])
    with _blocked():
        resource_tracker.ensure_running()  # it unblocks those that it ignores, and not the others
    with environment_with({"OMP_NUM_THREADS": str(threads_per_rank(ranks))}), _blocked():
        forkserver.ensure_running()


def launch(job: Job, quiet: bool = False, changed: Callable[[], str | None] | None = None) -> None:
    """Run a job's ranks on this machine and wait for their end.

    quiet: nothing of the ranks on the terminal, as when several runs share it
    changed: looked at from time to time: what has changed so that the ranks are to stop, and a job for more or fewer to
        be launched (GoingOn)

    Raises UserError for what a user can mend, RankFailure when a rank failed or hung (all others are ended then),
    Stopped when the ranks have stopped and saved as asked, KeyboardInterrupt when Ctrl-C ended them, SystemExit for
    other signals. See `megapar.launch.signals` for what a signal does.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    for name in ("torch.distributed.elastic", "torch.multiprocessing.spawn"):
        # We say what happened, in one place. A level would not do: the loggers below these have levels of their own.
        logger = logging.getLogger(name)
        logger.propagate = False
        logger.addHandler(logging.NullHandler())
    allow_open_files(job.ranks)
    # A process that forks from the server has imported the kernels. Where the job changes how they are imported, each
    # starts afresh, which takes seconds.
    afresh = INTERPRET in job.env
    if not afresh:
        start_fork_server(job.ranks)
    variables = {"OMP_NUM_THREADS": str(threads_per_rank(job.ranks))} | job.env if afresh else {}
    with (
        tempfile.TemporaryDirectory(prefix="megapar-") as scratch,
        kept(),
        _no_names_asked_for(),
        environment_with(variables),
        removed_if_killed(scratch, multiprocessing.util.get_temp_dir()),
        board_of(job) as memory,
        ExitStack() as stack,
    ):
        request = StopRequest(Path(scratch))
        signals = Signals(request, job.stopping, job.grace_s, changed)
        if job.typed:
            os.mkfifo(Path(scratch) / TYPED)
            threading.Thread(target=_pass_on, args=(Path(scratch) / TYPED,), daemon=True).start()
        stop_in = None if job.stop_at is None else max(0.0, job.stop_at - time.monotonic())
        try:  # a signal may come as soon as they are handled
            stack.enter_context(signals.handled(stop_in))
            ignored = tuple(
                one.name for one in ENDING if signal.getsignal(one) == signal.SIG_IGN or one in signals.taken
            )
            job = replace(
                job,
                quiet=quiet,
                threads=threads_per_rank(job.ranks),
                reports=scratch,
                scratch=(scratch, multiprocessing.util.get_temp_dir()),
                env=LOOPBACK | job.env,
                ignored=ignored,
                stop_at=None,  # the launcher minds the time
                board=None if memory is None else memory.path,
            )
            watch = stack.enter_context(Watch(job, memory).watching())
            settings = _settings(job, scratch, "spawn" if afresh else "forkserver")
            killed_before = out_of_memory_kills()
            elastic_launch(settings, run_elastic)(job)
        except OSError as error:  # of semaphores between processes
            if error.errno != errno.ENOSPC:
                raise
            raise UserError(
                "/dev/shm: no room for what processes share; make some (df /dev/shm says how much)"
            ) from None
        except ChildFailedError as error:
            try:
                _raise_cause(job, error, killed_before, watch)
            except RankFailure as failure:
                failure.asked = request.asked() and not signals.going_on
                raise
        except SignalException as error:
            if signals.early:
                raise Stopped from None
            by = signals.ended_by or error.sigval
            if by == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise SystemExit(128 + by.value) from None
        if request.answered():
            raise GoingOn if signals.going_on else Stopped


def _settings(job: Job, scratch: str, start_method: str) -> Any:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs

    from megapar.torch_compat import launch_config

    return launch_config(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=job.ranks,
        run_id=f"megapar-{uuid.uuid4().hex}",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
        start_method=start_method,
        logs_specs=DefaultLogsSpecs(log_dir=scratch),
        shutdown_timeout=5,
        # Torch's handlers would undo what nohup, or a shell's `&`, has asked for, and ours.
        signals_to_handle=",".join(one.name for one in ENDING if one.name not in job.ignored),
    )


def _raise_cause(job: Job, error: Any, killed_before: int | None, watch: Watch) -> None:
    """Raise for the rank at fault: one that hung, one that reported its own failure, one ended by a signal, a victim.

    killed_before: `out_of_memory_kills` when the ranks started
    """
    reports = read_reports(str(job.reports))
    if watch.finding is not None:
        raise RankFailure(watch.finding) from None
    if not any(report.kind != "victim" for report in reports):
        told = {report.rank for report in reports}
        silent = [rank for rank, failure in error.failures.items() if rank not in told and not _ended_by_us(failure)]
        first = error.get_first_failure()[0]
        rank = first if first in silent or not silent else silent[0]
        failure = error.failures[rank]
        if rank not in told:
            name = failure.signal_name() if failure.exitcode < 0 else ""
            hint = who_kills(killed_before, out_of_memory_kills()) if name == "SIGKILL" else ""
            how = f"ended by {name}{hint}" if name else f"exit code {failure.exitcode}"
            line = f"rank {rank} failed: {how}{watch.where(rank)}; logs: {job.log(rank)}"
            raise RankFailure(watch.out_of_step() + line) from None
    cause: Report = reports[0]
    raise (UserError if cause.kind == "user" else RankFailure)(failure_text(cause, job)) from None


def _ended_by_us(failure: Any) -> bool:
    """Whether a rank ended as those do that torch elastic ends when another one has failed."""
    return bool(failure.exitcode == -signal.SIGTERM)


def _pass_on(pipe: Path) -> None:
    """Copy standard input to rank 0, to its end: processes that the fork server starts have none. By its descriptor, as
    a thread in Python's own file would be in the way of this process's end."""
    with suppress(OSError), open(pipe, "wb", buffering=0) as to:
        while given := os.read(0, 1 << 16):
            to.write(given)


@contextmanager
def _blocked() -> Iterator[None]:
    """A process that starts meanwhile does not see what asks a run to stop until it unblocks it, as `preload` does: a
    terminal, `timeout` and a scheduler send it to every process, and the launcher alone is to mind it."""
    kept = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, kept)


@contextmanager
def _no_names_asked_for() -> Iterator[None]:
    """Torch elastic writes this machine's full name into its events, which go nowhere here; where no resolver answers,
    asking for it takes many seconds."""
    kept = socket.getfqdn
    socket.getfqdn = lambda name="": "127.0.0.1"
    try:
        yield
    finally:
        socket.getfqdn = kept


@contextmanager
def environment_with(values: dict[str, str]) -> Iterator[None]:
    """Set variables where not set yet, and put the environment back afterwards."""
    kept = dict(os.environ)
    for name, value in values.items():
        os.environ.setdefault(name, value)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)
