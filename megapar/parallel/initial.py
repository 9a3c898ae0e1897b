"""Initial values: a function of (seed, name, element) alone, so that any rank makes its own shard."""

import hashlib
from itertools import product
from math import prod

import numpy as np
import torch
from torch import Tensor

from megapar.parallel.record import Constant, Given, Normal, ParameterRecord, Shard

_CHUNK = 1 << 18


def normal_values(seed: int, name: str, start: int, stop: int) -> np.ndarray:
    """Standard normal values number `start` to `stop` of the stream (seed, name), float64.

    Counter-based (Salmon et al. 2011, Philox): value i costs the same wherever the range begins. One 64-bit word makes
    one value (Box-Muller on its halves), so position and word count stay equal, unlike numpy's ziggurat.
    """
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()
    generator = np.random.Philox(key=int.from_bytes(digest, "little"))
    generator.advance(start // 4)  # four words per counter value
    words = generator.random_raw(stop - start // 4 * 4)[start % 4 :]
    radius = np.sqrt(-2.0 * np.log(((words >> np.uint64(32)) + 1.0) * 2.0**-32))
    return radius * np.cos((words & np.uint64(0xFFFFFFFF)) * (2.0 * np.pi * 2.0**-32))


def fill(record: ParameterRecord, shard: Shard, seed: int, out: Tensor) -> None:
    """Write a shard's initial values into `out` [shard.shape], any dtype and device.

    Value number i belongs to element i of the logical tensor with the divided dims moved to the front. These are a
    property of the record and not of the layout, so every shard is a few runs of that order, made without the rest, and
    the union over any number of ranks is bit for bit the one-process tensor. Memory: a few MiB, at least one row.
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
            start = before * shape[last]
            values = normal_values(seed, record.name, (start + first) * row, (start + stop) * row) * std
            part = into[first - box[last].start : stop - box[last].start]
            part.copy_(torch.from_numpy(values).view(part.shape))
