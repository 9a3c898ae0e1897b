"""Counters in device memory that hand out the tiles of a matmul, each to the program that asks next.

A launch finds its counter at 0 and leaves it at 0, so that nothing has to clear it. Every program draws until there is
no tile left, so all of them draw tiles + programs times, and whoever made the last draw puts the counter back: nobody
is left who could read it.

No two launches that may run at once share one. Eager launches of a stream run one after another (none is a programmatic
dependent launch, which would begin early), and a stream has one counter. Each launch that a CUDA graph captures has one
that no other launch ever gets: replays of one graph never overlap, whatever streams they are on and whatever runs
beside them.
"""

import threading

import torch
from torch import Tensor

from megapar.kernels import tile_scheduler
from megapar.kernels._common import device_function, tl

COUNTERS = 1 << 16  # of a GPU: 1 MB
APART = 4  # elements from one to the next: 16 bytes, the alignment that a compiled launch expects


@device_function
def next_tile(counter):
    """The next number from 0 on, to one program only. Beyond the last tile: none is left."""
    return tl.atomic_add(counter, 1, sem="relaxed")


@device_function
def put_back(counter, number, tiles):
    """Leave the counter at 0 if this number, at which a program ended, is the last of all draws."""
    if number == tiles + tl.num_programs(0) - 1:
        tl.store(counter, 0)


class Counters:
    """The counters [COUNTERS, APART] of one device, int32, all 0 between launches."""

    def __init__(self, device: torch.device, number: int = COUNTERS) -> None:
        self.memory = torch.zeros(number, APART, dtype=torch.int32, device=device)
        if self.memory.is_cuda:
            torch.cuda.synchronize(device)  # zeros for every stream
        self._free, self._of_stream, self._lock = iter(range(number)), dict[int, Tensor](), threading.Lock()

    def take(self, stream: int, captured: bool) -> Tensor | None:
        """The counter of a launch on this stream. captured: into a CUDA graph. None: they have all been given out."""
        with self._lock:
            if captured:
                return self._fresh()
            if stream not in self._of_stream:
                fresh = self._fresh()
                if fresh is None:
                    return None
                self._of_stream[stream] = fresh
            return self._of_stream[stream]

    def _fresh(self) -> Tensor | None:
        number = next(self._free, None)
        return None if number is None else self.memory[number]


_of_device: dict[torch.device, Counters] = {}


def reserve_counters(device: torch.device) -> None:
    """Make a GPU's counters, as `counter_of` does where no graph is captured: captures find them then."""
    if device.type == "cuda" and device not in _of_device:
        _of_device[device] = Counters(device)


def counter_of(out: Tensor) -> Tensor | None:
    """A counter at 0 for a launch that writes `out` on the current stream; None: its programs take fixed tiles.

    That is so under `kernels.tile_scheduler=static`, and where a capture finds none: it can't make memory of zeros that
    is there before a replay.
    """
    if tile_scheduler() == "static":
        return None
    if not out.is_cuda:  # interpreted, where an exception may end a launch between its draws
        return torch.zeros(APART, dtype=torch.int32, device=out.device)
    captured = torch.cuda.is_current_stream_capturing()
    if not captured:
        reserve_counters(out.device)
    counters = _of_device.get(out.device)
    if counters is None:
        return None
    return counters.take(torch._C._cuda_getCurrentRawStream(out.device.index), captured)
