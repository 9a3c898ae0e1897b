"""Breaks on purpose what `fault.plan` says: at a named operation of a rank, once in a run."""

import ctypes
import errno
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megapar.checkpoint import find_checkpoint, read_manifest
from megapar.config.faults import PHASES, Fault, faults
from megapar.config.schema import TrainConfig
from megapar.parallel.collectives import all_reduce
from megapar.stop import stop_request
from megapar.train.hooks.hook import Hook

if TYPE_CHECKING:
    from megapar.train.loop import Loop
    from megapar.train.trainer import Step

LONG_S = 3600  # that a rank hangs
MATMULS = ("mm", "addmm", "bmm", "baddbmm", "addmv", "mv")


class FaultInjector(Hook):
    """Listens to the rank's timeline. Without a plan there is no such hook, and nothing listens."""

    order = 0

    @classmethod
    def wanted(cls, config: TrainConfig) -> bool:
        return bool(config.fault.plan)

    def __init__(self, loop: "Loop") -> None:
        super().__init__(loop)
        mesh = loop.trainer.mesh
        planned = list(enumerate(faults(loop.config.fault.plan)))
        self._mine = [(index, fault) for index, fault in planned if fault.rank == mesh.rank]
        self._struck = loop.folder / ".faults"
        self._struck.mkdir(exist_ok=True)
        self._step, self._seen = 0, Counter[int]()
        self._flipping: _FlipMatmul | None = None
        mesh.timeline.listeners.append(self._operation)

    def before(self, step: int) -> None:
        self._step, self._seen = step, Counter()

    def after(self, step: int, done: "Step") -> None:
        if self._flipping is not None:
            self._flipping.__exit__(None, None, None)
            self._flipping = None

    def finish(self) -> dict[str, Any]:
        """Says which faults have not come: a run that nothing happened to has survived nothing."""
        if self.loop.writer is not None:
            struck = {int(path.name.partition("-")[0]) for path in self._struck.iterdir()}
            for index, fault in enumerate(faults(self.loop.config.fault.plan)):
                if index not in struck and fault.step <= self._step:
                    self.loop.writer.say(f"fault.plan: entry {index} never came: {fault}")
        return {}

    def _operation(self, kind: str, name: str) -> None:
        """An operation begins."""
        for index, fault in self._mine:
            if fault.step == self._step and kind in PHASES[fault.phase] and fault.point in name:
                self._seen[index] += 1
                if self._seen[index] == fault.nth + 1:
                    self._strike(index, fault, name)

    def _strike(self, index: int, fault: Fault, name: str) -> None:
        try:
            (self._struck / f"{index}-{fault.kind}-rank-{fault.rank}-step-{fault.step}").touch(exist_ok=False)
        except FileExistsError:
            return
        print(f"fault {index}: {fault} at {name}", flush=True)
        getattr(self, f"_{fault.kind}")(fault)

    def _sigkill(self, fault: Fault) -> None:
        kill = next(path for path in ("/bin/kill", "/usr/bin/kill") if Path(path).exists())
        os.posix_spawn(kill, [kill, "-9", str(os.getpid())], os.environ)
        time.sleep(LONG_S)

    def _sigstop(self, fault: Fault) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def _segv(self, fault: Fault) -> None:
        ctypes.string_at(0)

    def _exit(self, fault: Fault) -> None:
        os._exit(7)

    def _exception(self, fault: Fault) -> None:
        raise RuntimeError("a fault of fault.plan")

    def _hang(self, fault: Fault) -> None:
        time.sleep(LONG_S)

    def _gil(self, fault: Fault) -> None:
        ctypes.PyDLL(None).sleep(LONG_S)  # unlike CDLL, it keeps the lock

    def _delay(self, fault: Fault) -> None:
        time.sleep(fault.seconds)

    def _ask(self, fault: Fault) -> None:
        stop_request().here.set()

    def _desync(self, fault: Fault) -> None:
        mesh = self.loop.trainer.mesh
        all_reduce(torch.zeros(3, device=mesh.device), mesh["world"])

    def _disk_full(self, fault: Fault) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _nonfinite(self, fault: Fault) -> None:
        self.loop.trainer.buffers.buckets[0].grads[0] = float("nan")

    def _flip_file(self, fault: Fault) -> None:
        newest = find_checkpoint(self.loop.folder)
        file = newest / min(read_manifest(newest).files)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)

    def _flip_memory(self, fault: Fault) -> None:
        with torch.no_grad():
            flip(self.loop.trainer.buffers.buckets[0].params[:1])

    def _flip_message(self, fault: Fault) -> None:
        _after_next(dist, "all_reduce")

    def _flip_matmul(self, fault: Fault) -> None:
        self._flipping = _FlipMatmul()
        self._flipping.__enter__()


def flip(values: Tensor, bit: int = 12) -> None:
    """Flip one bit of the last element, in place."""
    bits = values.detach().view(-1)[-1:].view(torch.uint8)
    bits[-1 - bit // 8] ^= 1 << (bit % 8)


def _after_next(module: Any, name: str) -> None:
    """Flip a bit in the first argument of the next call of a collective, once that is over."""
    original: Callable[..., Any] = getattr(module, name)

    @wraps(original)
    def once(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        setattr(module, name, original)
        work = original(x, *args, **kwargs)
        if work is not None:
            work.wait()
        with torch.no_grad():
            flip(x.view(-1)[:1])  # the last ones of a bucket may be padding
        return work

    setattr(module, name, once)


class _FlipMatmul(TorchDispatchMode):
    """Flips a bit in the result of the next matmul."""

    done = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.done and func._overloadpacket.__name__ in MATMULS:
            self.done = True
            flip(result)
        return result


HOOK = FaultInjector
