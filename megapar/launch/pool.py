"""A pool of processes for many short distributed jobs: `verify` and the tests run dozens of layouts in one pool."""

import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any

from megapar.kernels import INTERPRET
from megapar.launch.local import environment_with, start_fork_server
from megapar.launch.machine import spare_garbage_collector, threads_per_rank
from megapar.launch.rank import die_with_parent, is_lost_peer

MANY = 64  # ranks that share few cores: one thread each
GRACE_S = 1.5  # after the first failure, for the other ranks to say what they have to say


class PoolError(Exception):
    """A job failed. `str` is the traceback of the rank at fault, then a line each for the others.

    rank: the rank at fault; error: its exception, None for a rank that died or hung
    """

    def __init__(self, text: str, rank: int, error: BaseException | None) -> None:
        super().__init__(text)
        self.rank = rank
        self.error = error


class WorkerPool:
    """`size` processes that keep torch imported. Use as a context manager, or call `close`.

    Each has one thread, and runs one job after another as a rank of that job's own process group.
    interpret: they run Triton kernels in Triton's interpreter, so each imports everything afresh
    """

    def __init__(self, size: int, interpret: bool = False) -> None:
        if not interpret:
            start_fork_server(MANY)
        self.size, self._interpret = size, interpret
        self._folder = tempfile.TemporaryDirectory(prefix="megapar-pool-")
        self._jobs = 0
        self._workers = [self._start(index) for index in range(size)]

    def run(
        self,
        fn: Callable[..., Any],
        world_size: int,
        *args: Any,
        timeout: float = 120.0,
        operation_timeout: float | None = None,
        device: str = "cpu",
    ) -> list[Any]:
        """`fn(rank, world_size, *args)` in ranks 0..world_size-1; returns their results by rank.

        fn and args travel by pickle, so fn is a function at the top level of a module. For more than one rank a default
        process group of exactly these ranks is there, and gone afterwards with every group made from it.
        timeout: seconds for the whole job; operation_timeout: for one operation of the group, by default the same.
        device: cpu: gloo; cuda: NCCL, and every rank has the GPU of its number.
        Raises PoolError when a rank fails, dies or is not done by then; the pool
        has replaced the processes that were part of it and can be used again.
        """
        if not 1 <= world_size <= self.size:
            raise ValueError(f"world_size={world_size}: the pool has {self.size} processes")
        self._jobs += 1
        for rank in range(world_size):
            meeting = f"{self._folder.name}/store-{self._jobs}"
            self._workers[rank].send((fn, rank, world_size, args, meeting, operation_timeout or timeout, device))
        answers, timed_out = self._collect(world_size, time.monotonic() + timeout)
        if len(answers) == world_size and all(answer[0] == "done" for answer in answers.values()):
            return [answers[rank][1] for rank in range(world_size)]
        stacks = self._stacks(set(range(world_size)) - answers.keys()) if timed_out else {}
        for rank in range(world_size):
            self._workers[rank].stop()
            self._workers[rank] = self._start(rank)
        raise _blame(answers, stacks, world_size, timeout)

    def close(self) -> None:
        """End all processes."""
        for worker in self._workers:
            worker.stop()
        self._workers = []
        self._folder.cleanup()

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def _start(self, index: int) -> "_Worker":
        return _Worker(Path(self._folder.name) / f"stack-{index}-{self._jobs}.txt", self._interpret)

    def _collect(self, world_size: int, deadline: float) -> tuple[dict[int, Any], bool]:
        """Answers by rank, and whether time ran out on the ranks that are missing."""
        answers: dict[int, Any] = {}
        failed = False
        while len(answers) < world_size:
            waiting = {self._workers[rank].pipe: rank for rank in range(world_size) if rank not in answers}
            ready = connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                return answers, not failed
            for pipe in ready:
                rank = waiting[pipe]
                answers[rank] = self._workers[rank].receive()
                if answers[rank][0] != "done" and not failed:
                    failed, deadline = True, min(deadline, time.monotonic() + GRACE_S)
        return answers, False

    def _stacks(self, ranks: set[int]) -> dict[int, str]:
        """The Python stacks of ranks that are still running."""
        for rank in ranks:
            self._workers[rank].ask_for_stack()
        time.sleep(0.3)
        return {rank: self._workers[rank].stack() for rank in ranks}


class _Worker:
    """The parent's side of one process."""

    def __init__(self, stack_file: Path, interpret: bool) -> None:
        context: Any = multiprocessing.get_context("spawn" if interpret else "forkserver")
        added = {INTERPRET: "1", "OMP_NUM_THREADS": str(threads_per_rank(MANY))} if interpret else {}
        self.pipe, theirs = context.Pipe()
        self._stack_file = stack_file
        self._process = context.Process(target=_serve, args=(theirs, str(stack_file)), daemon=True)
        with environment_with(added):
            self._process.start()
        theirs.close()

    def send(self, job: tuple[Any, ...]) -> None:
        self.pipe.send_bytes(pickle.dumps(job))  # plain pickle: tensors by value, not through shared memory

    def receive(self) -> tuple[Any, ...]:
        try:
            return pickle.loads(self.pipe.recv_bytes())
        except (EOFError, OSError):
            self._process.join(5)
            return "died", self._process.exitcode
        except Exception as error:  # what it sent can't be read here
            return "failed", None, traceback.format_exc(), f"{type(error).__name__}: {error}", False, time.time()

    def ask_for_stack(self) -> None:
        if self._process.pid is not None and self._process.is_alive():
            os.kill(self._process.pid, signal.SIGUSR1)

    def stack(self) -> str:
        return self._stack_file.read_text() if self._stack_file.exists() else ""

    def stop(self) -> None:
        self.pipe.close()
        self._process.kill()
        self._process.join()
        self._process.close()


def _serve(pipe: Any, stack_file: str) -> None:
    """The process: one job after another until the parent closes the pipe."""
    import torch

    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with open(stack_file, "w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=False)
        while True:
            try:
                received = pipe.recv_bytes()
            except EOFError:
                return
            spare_garbage_collector()  # what earlier jobs imported
            answer = _answer(received)
            pipe.send_bytes(pickle.dumps(answer))
            if answer[0] != "done":
                # Its peers may be stuck in a collective with us: leave at once, which closes the connections.
                os._exit(1)


def _answer(received: bytes) -> tuple[Any, ...]:
    """("done", result), or ("failed", exception or None, traceback, line, whether only a peer was lost, time)"""
    try:
        result = _run(*pickle.loads(received))
        pickle.dumps(result)
        return "done", result
    except BaseException as error:
        text = "".join(traceback.format_exception(error))
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        kept: BaseException | None = error
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            kept = None
        return "failed", kept, text, line, is_lost_peer(error), time.time()


def _run(
    fn: Callable[..., Any], rank: int, world_size: int, args: Any, meeting: str, timeout: float, device: str
) -> Any:
    import torch
    import torch.distributed as dist

    if device == "cuda":
        torch.cuda.set_device(rank)
    if world_size == 1:
        return fn(rank, world_size, *args)
    limit = timedelta(seconds=timeout)
    # A file: connecting to a TCPStore stood still for 5 s in one of ten jobs where this was written.
    store = dist.FileStore(meeting, world_size)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)
    result = fn(rank, world_size, *args)
    # Not in a `finally`: after a failure the process ends, and destroying a group whose peers hang may never return.
    _wait_for_peers()
    dist.destroy_process_group()
    return result


def _wait_for_peers() -> None:
    """A rank that is done must not close connections on which others still read."""
    import torch.distributed as dist

    dist.barrier()


def _blame(answers: dict[int, Any], stacks: dict[int, str], world_size: int, timeout: float) -> PoolError:
    """The error of a failed job: the rank at fault first, a line for each of the others."""
    failed = {rank: answer for rank, answer in answers.items() if answer[0] == "failed"}
    own = sorted((answer[5], rank) for rank, answer in failed.items() if not answer[4])
    died = sorted(rank for rank, answer in answers.items() if answer[0] == "died")
    lines = {rank: f"rank {rank}: {answer[3]}" for rank, answer in failed.items()}
    lines |= {rank: f"rank {rank}: died with exit code {answers[rank][1]}" for rank in died}
    if own:
        culprit, error = own[0][1], failed[own[0][1]][1]
        head = f"{failed[culprit][2]}rank {culprit} of {world_size} failed"
    elif died:
        culprit, error, head = died[0], None, lines[died[0]]
    elif stacks:
        late = sorted(rank for rank in stacks if "_wait_for_peers" not in stacks[rank]) or sorted(stacks)
        culprit, error = late[0], None
        names = ", ".join(str(rank) for rank in late)
        shown = "".join(f"\nrank {rank} stood at:\n{_own_frames(stacks[rank])}" for rank in late)
        head = f"not done after {timeout:g} s, still running: rank {names}{shown}"
    else:
        culprit = min(failed, key=lambda rank: failed[rank][5])
        error, head = failed[culprit][1], f"{failed[culprit][2]}rank {culprit} of {world_size} failed"
    others = [line for rank, line in sorted(lines.items()) if rank != culprit]
    return PoolError("\n".join([head, *others]), culprit, error)


def _own_frames(stack: str) -> str:
    """A stack as faulthandler writes it, down to where the pool called the job's function."""
    lines = stack.rstrip().splitlines()
    end = next((number for number, line in enumerate(lines) if __file__ in line), len(lines))
    return "\n".join(lines[:end])
