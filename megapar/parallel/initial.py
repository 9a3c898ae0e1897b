"""Initial values: a function of (seed, name, element) alone, so that any rank makes its own shard."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from math import prod

import numpy as np
import torch
from torch import Tensor

from megapar.parallel.record import Constant, Given, Normal, ParameterRecord, Shard

# Values that are made together: their buffers of 256 KB stay in a core's cache, and torch, which converts them, starts
# no threads of its own for so few.
_CHUNK = 1 << 15
_WORTH_THREADS = 1 << 20  # values


def normal_values(seed: int, name: str, start: int, stop: int) -> np.ndarray:
    """Standard normal values number `start` to `stop` of the stream (seed, name), float64.

    Counter-based (Salmon et al. 2011, Philox): value i costs the same wherever the range begins. One 64-bit word makes
    one value (Box-Muller on its halves), so position and word count stay equal, unlike numpy's ziggurat.
    """
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()
    generator = np.random.Philox(key=int.from_bytes(digest, "little"))
    generator.advance(start // 4)  # four words per counter value
    words = generator.random_raw(stop - start // 4 * 4)[start % 4 :]
    radius = (words >> np.uint64(32)) + 1.0
    radius *= 2.0**-32
    np.log(radius, out=radius)
    radius *= -2.0
    np.sqrt(radius, out=radius)
    words &= np.uint64(0xFFFFFFFF)
    angle = words * (2.0 * np.pi * 2.0**-32)
    radius *= np.cos(angle, out=angle)
    return radius


def fill(record: ParameterRecord, shard: Shard, seed: int, out: Tensor) -> None:
    """Write a shard's initial values into `out` [shard.shape], any dtype and device.

    Value number i belongs to element i of the logical tensor with the divided dims moved to the front. These are a
    property of the record and not of the layout, so every shard is a few runs of that order, made without the rest, and
    the union over any number of ranks is bit for bit the one-process tensor. Memory: a few MiB a thread, at least one
    row; for another device than the CPU one tensor more on the host.
    """
    if out.is_meta:
        return
    match record.init:
        case Constant(value):
            out.fill_(value)
        case Normal(std):
            _fill_normal(record, shard, seed, std, out)
        case Given():
            raise AssertionError(f"{record.name} comes with its values")


def _fill_normal(record: ParameterRecord, shard: Shard, seed: int, std: float, out: Tensor) -> None:
    on_host = out if out.device.type == "cpu" else torch.empty_like(out, device="cpu")
    write = partial(_write, seed, record.name, std)
    threads = torch.get_num_threads()
    if threads == 1 or out.numel() < _WORTH_THREADS:
        for run in _runs(record, shard, on_host):
            write(run)
    else:
        with ThreadPoolExecutor(threads) as pool:  # numpy computes without the interpreter's lock
            list(pool.map(write, _runs(record, shard, on_host)))
    if on_host is not out:
        out.copy_(on_host)


def _write(seed: int, name: str, std: float, run: tuple[int, Tensor]) -> None:
    start, part = run
    values = normal_values(seed, name, start, start + part.numel())
    values *= std
    part.copy_(torch.from_numpy(values).view(part.shape))


def _runs(record: ParameterRecord, shard: Shard, out: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(number of the first value, the part of `out` that it and those behind it go to), which make up all of `out`."""
    front = [split.dim for split in record.splits] or [0]
    order = [*front, *(dim for dim in range(len(record.shape)) if dim not in front)]
    shape, box = [record.shape[dim] for dim in order], [shard.box[dim] for dim in order]
    moved = out.permute(order)
    last = len(front) - 1  # along the last of the divided dims a shard's rows are one run
    row = prod(shape[last + 1 :])
    rows = max(1, _CHUNK // row)
    for outer in product(*(range(place.start, place.stop) for place in box[:last])):
        before = 0
        for index, length in zip(outer, shape, strict=False):
            before = before * length + index
        into = moved[tuple(index - place.start for index, place in zip(outer, box, strict=False))]
        for first in range(box[last].start, box[last].stop, rows):
            stop = min(box[last].stop, first + rows)
            start = before * shape[last] + first
            yield start * row, into[first - box[last].start : stop - box[last].start]
