"""The one place where a replay looks into megapar: who builds, steps and closes a rank's part, and what it holds."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from itertools import accumulate

import torch
import torch.distributed as dist

from megapar.config.schema import TrainConfig
from megapar.cores import num_cores
from megapar.inspect import compile
from megapar.train.trainer import Trainer


@dataclass(frozen=True)
class Held:
    """A logical parameter's part on a rank: elements [start, stop) along every dim of `shape`, at `place` in the flat
    buffer of parameters."""

    place: int
    name: str
    shape: tuple[int, ...]
    box: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Bucket:
    """Elements [start, stop) of the flat buffers; of them the rank owns [first, last) (optimizer state)."""

    start: int
    stop: int
    first: int
    last: int
    parameters: list[str]


def world_of(config: TrainConfig) -> int:
    """The number of ranks."""
    return config.parallel.tp * config.parallel.pp * (config.parallel.dp or 1)


def build(config: TrainConfig, rank: int) -> Trainer:
    """What `megapar train` builds on a rank. The default process group is up."""
    return Trainer(config, rank)


def step(trainer: Trainer) -> None:
    """Optimizer step 1. Raises AssertionError where it is skipped: a replay would then miss the update."""
    assert not trainer.step(1).result.skipped, "the replayed gradient is not finite"


def evaluate(trainer: Trainer) -> None:
    trainer.evaluate()


def close(trainer: Trainer) -> None:
    trainer.close()


def held(trainer: Trainer) -> list[Held]:
    """In the order of the flat buffer."""
    found = []
    starts = _starts(trainer)
    for one in trainer.buffers.held():
        record, box = one.piece.record, tuple((place.start, place.stop) for place in one.piece.shard.box)
        assert one.run.stop - one.run.start == torch.Size(b - a for a, b in box).numel()
        found.append(Held(starts[one.bucket] + one.run.start, record.name, tuple(record.shape), box))
    return sorted(found, key=lambda one: one.place)


def buckets(trainer: Trainer) -> list[Bucket]:
    found = []
    for start, bucket in zip(_starts(trainer), trainer.buffers.buckets, strict=True):
        names = [parameter.name for parameter in bucket.offsets]
        part = bucket.owned
        found.append(Bucket(start, start + bucket.size, start + part.start, start + part.stop, names))
    return found


def _starts(trainer: Trainer) -> list[int]:
    """Where each bucket would begin if they lay one after the other."""
    return [0, *accumulate(bucket.size for bucket in trainer.buffers.buckets)][:-1]


def flat_tensors(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Parameters, main gradients and the optimizer's state."""
    buffers = trainer.buffers
    tensors = {"parameters": buffers.params, "gradients": buffers.grads} | trainer.optimizer.tensors()
    return {kind: torch.cat(of_buckets) for kind, of_buckets in tensors.items()}


def row(trainer: Trainer) -> list[str]:
    """This rank's row of the schedule."""
    return [str(action) for action in trainer.schedule.rows[trainer.mesh["pp"].index]]


def axes(trainer: Trainer) -> Iterator[tuple[str, dist.ProcessGroup]]:
    """Every axis of the mesh that has a group, by name."""
    for name, axis in trainer.mesh._axes.items():
        if axis.group is not None:
            yield name, axis.group


def compiler() -> str:
    """The version of Triton."""
    return metadata.version("triton")


def machine_code(targets: tuple[str, ...]) -> list[tuple[str, str, str]]:
    """(target, name, disassembly) of every kernel that `megapar kernels` compiles for these NVIDIA targets."""
    specs = compile.specs_of(None, list(targets))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(num_cores(), len(specs)), mp_context=context) as pool:
        texts = list(pool.map(_machine_code_of, specs))
    return [(spec.target, spec.name, text) for spec, text in zip(specs, texts, strict=True)]


def _machine_code_of(spec: compile.Spec) -> str:
    text, _ = compile._disassemble(compile.compile_spec(spec).asm["cubin"])
    return text
