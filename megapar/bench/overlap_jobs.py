"""What a rank runs for `megapar bench overlap`. Every function is a job of a pool: one process group, gone after it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megapar.config.derive import resolve
from megapar.config.keys import changed
from megapar.config.layout import Layout
from megapar.config.schema import TrainConfig
from megapar.data.indexed import write_indexed
from megapar.kernels.matmul import matmul
from megapar.launch.machine import keep_freed_memory
from megapar.mesh import Axis, Mesh
from megapar.parallel.collectives import all_gather, all_reduce, reduce_scatter
from megapar.parallel.engines import Chunked, Engine, Meanwhile, Operation, Serial, choose
from megapar.parallel.overlap import (
    Overlap,
    all_gather_matmul,
    copy_matmul,
    matmul_all_reduce,
    matmul_reduce_scatter,
)
from megapar.part import make_mesh
from megapar.report.pieces import Walk
from megapar.trace.file import KINDS
from megapar.trace.spans import FLIGHT
from megapar.train.trainer import Trainer

Times = list[tuple[float, float]]  # seconds of forward and of backward


@dataclass(frozen=True)
class Layer:
    """A tensor-parallel MLP: [tokens, hidden] -> [tokens, ffn] -> [tokens, hidden], fp32."""

    tokens: int
    hidden: int
    ffn: int
    sequence_parallel: bool
    pieces: int | None

    def engine_pieces(self, ranks: int) -> int:
        """Pieces that the chunked engine cuts this layer's rows into: as many as are asked for or its table says, where
        there are rows for them."""
        rows = self.tokens // ranks if self.sequence_parallel else self.tokens
        if self.pieces is not None:
            return len(Chunked(self.pieces).cut(rows))
        with torch.device("meta"):
            x, w = torch.empty(self.tokens, self.ffn // ranks), torch.empty(self.ffn // ranks, self.hidden)
        operation: Operation = "matmul_reduce_scatter" if self.sequence_parallel else "matmul_all_reduce"
        engine = choose("chunked", operation, x, w, ranks, device="cpu")
        assert isinstance(engine, Chunked)
        return len(engine.cut(rows))


class Alone(Serial):
    """The matmuls without their collectives."""

    def matmul_all_reduce(self, x: Tensor, w: Tensor, axis: Axis, meanwhile: Meanwhile) -> Tensor:
        y = matmul(x, w)
        meanwhile()
        return y

    def matmul_reduce_scatter(self, x: Tensor, w: Tensor, axis: Axis, meanwhile: Meanwhile) -> Tensor:
        y = matmul(x, w)
        meanwhile()
        return y[: len(x) // axis.size]

    def all_gather_matmul(self, x: Tensor, w: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
        gathered = x.new_empty(len(x) * axis.size, x.shape[1])
        return matmul(gathered, w), gathered


class Mlp:
    """One rank's part of the layer, and a pass through it with a given engine."""

    def __init__(self, layer: Layer, axis: Axis) -> None:
        self.layer, self.axis = layer, axis
        rows = layer.tokens // axis.size if layer.sequence_parallel else layer.tokens
        torch.manual_seed(axis.index)
        self.x = torch.randn(rows, layer.hidden, requires_grad=True)
        self.dy = torch.randn(rows, layer.hidden)
        width = layer.ffn // axis.size
        self.up = (torch.randn(width, layer.hidden) * layer.hidden**-0.5).requires_grad_()
        self.down = (torch.randn(layer.hidden, width) * layer.ffn**-0.5).requires_grad_()

    def run(self, engine: Engine | None) -> tuple[float, float]:
        """Seconds of forward and of backward. engine: None for what `auto` takes."""
        overlap = Overlap(self.axis) if engine is None else _Fixed(self.axis, engine)
        split = self.layer.sequence_parallel
        begun = time.perf_counter()
        inner = torch.relu((all_gather_matmul if split else copy_matmul)(self.x, self.up, overlap))
        y = (matmul_reduce_scatter if split else matmul_all_reduce)(inner, self.down, overlap)
        between = time.perf_counter()
        torch.autograd.grad(y, [self.x, self.up, self.down], self.dy)
        return between - begun, time.perf_counter() - between

    def communicate(self) -> tuple[float, float]:
        """Seconds of the collectives alone, forward and backward: under sequence parallelism the same two."""
        whole = torch.empty(self.layer.tokens, self.layer.hidden)
        marks = [time.perf_counter()]
        for _ in range(2):
            if self.layer.sequence_parallel:
                all_gather(self.dy, self.axis)
                reduce_scatter(whole, self.axis)
            else:
                all_reduce(whole, self.axis)
            marks.append(time.perf_counter())
        return marks[1] - marks[0], marks[2] - marks[1]


class _Fixed(Overlap):
    def __init__(self, axis: Axis, engine: Engine) -> None:
        super().__init__(axis)
        self.fixed = engine

    def engine(self, *operands: Any) -> Engine:
        return self.fixed


def time_layer(rank: int, world_size: int, layer: Layer, pairs: int) -> tuple[dict[str, Times], dict[str, Walk]]:
    """(times by engine, and of computation and communication alone; rank 0's median passes as walks, by engine)"""
    keep_freed_memory()
    mesh = Mesh(Layout(tp=world_size), rank)
    mesh.timeline.detailed = True
    mlp = Mlp(layer, mesh["tp"])
    chunked = Chunked(layer.engine_pieces(world_size))
    ways: dict[str, Callable[[], tuple[float, float]]] = {
        "serial": lambda: mlp.run(Serial()),
        "chunked": lambda: mlp.run(chunked),
        "auto": lambda: mlp.run(None),
        "compute": lambda: mlp.run(Alone()),
        "communication": mlp.communicate,
    }
    times: dict[str, Times] = {name: [] for name in ways}
    walks: dict[str, list[Walk]] = {"serial": [], "chunked": []}
    for repetition in range(pairs + 1):  # the first warms up
        for name, way in ways.items():
            dist.barrier()
            mesh.timeline.take()
            begun = time.perf_counter()
            took = way()
            if not repetition:
                continue
            times[name].append(took)
            if name in walks:
                spans = [(s.kind, s.name, s.start - begun, s.stop - begun) for s in mesh.timeline.take()]
                walks[name].append(Walk(took[0], took[1], spans))
    mesh.close()
    ordered = {name: sorted(each, key=lambda walk: walk.forward + walk.backward) for name, each in walks.items()}
    return times, {name: each[len(each) // 2] for name, each in ordered.items()}


STEP: dict[str, Any] = {
    "model.layers": 2,
    "model.hidden": 256,
    "model.heads": 4,
    "model.kv_heads": 4,
    "model.ffn": 768,
    "model.vocab_size": 1024,
    "train.seq_length": 256,
    "train.micro_batch_size": 8,
    "train.global_batch_size": 8,
    "train.dtype": "fp32",
    "parallel.sequence_parallel": True,
}
WIDE = {"model.hidden": 512, "model.ffn": 1024}


def write_tokens(folder: Path) -> str:
    """Token files of random documents; returns their PREFIX."""
    random = np.random.default_rng(0)
    documents = [random.integers(0, 1024, size=2048).astype(np.uint16) for _ in range(64)]
    write_indexed(folder / "tokens", documents, np.uint16)
    return str(folder / "tokens")


def step_config(prefix: str, **values: Any) -> TrainConfig:
    data = {"data.path": prefix, "data.prefix": prefix, "train.eval_every": 0}
    return resolve(changed(TrainConfig(), STEP | data | values))


def time_step(rank: int, world_size: int, prefix: str, pairs: int) -> dict[str, list[tuple[float, float]]]:
    """(seconds of a step, of them waiting for tp) of alternating steps, by engine.

    At 1 Gbit/s the step communicates about as long as it computes, on a core of these years. Narrower matmuls hide less
    of their transfers: their time goes with the square of the width.
    """
    keep_freed_memory()
    mesh: Mesh | None = None
    trainers: dict[str, Trainer] = {}
    for engine in ("serial", "chunked"):
        values = {"parallel.tp": world_size, "parallel.dp": 1, "parallel.tp_overlap": engine}
        config = step_config(prefix, **WIDE, **values)
        mesh = mesh or make_mesh(config, rank)
        trainers[engine] = Trainer(config, rank, mesh=mesh)
    times: dict[str, list[tuple[float, float]]] = {engine: [] for engine in trainers}
    for step in range(pairs + 1):
        for engine, trainer in trainers.items():
            dist.barrier()
            begun = time.perf_counter()
            done = trainer.step(step + 1)
            if step:
                waited = sum(span.seconds for span in done.spans if span.kind == "tp")
                times[engine].append((time.perf_counter() - begun, waited))
    assert mesh is not None
    mesh.close()
    return times


def time_reduction(rank: int, world_size: int, prefix: str, pairs: int) -> list[tuple[float, float, float]]:
    """Of steps with dp: seconds that reductions were in flight, that a rank waited for them, and of its B's.

    The last bucket is never hidden; of several layers it is a small part.
    """
    keep_freed_memory()
    config = step_config(
        prefix,
        **{
            "model.layers": 4,
            "parallel.dp": world_size,
            "parallel.sequence_parallel": False,
            "train.global_batch_size": 8 * world_size,
            "parallel.bucket_size": 200_000,
        },
    )
    trainer = Trainer(config, rank)
    trainer.mesh.timeline.detailed = True
    found = []
    for step in range(pairs + 1):
        dist.barrier()
        spans = trainer.step(step + 1).spans
        flights = [(span.start, span.stop) for span in spans if span.kind == FLIGHT]
        waited = sum(span.seconds for span in spans if span.kind == "dp")
        backward = sum(span.seconds for span in spans if span.kind == "B")
        found.append((covered(flights), waited, backward))
    trainer.close()
    return found[1:]


@dataclass(frozen=True)
class Phase:
    """A rank's pipeline phase: its length, how much of it the rank was busy, and its actions with their seconds."""

    seconds: float
    busy: float
    actions: list[tuple[str, float]]


def time_pipeline(rank: int, world_size: int, prefix: str, pairs: int) -> list[Phase]:
    """The phases of steps of 1F1B with 8 micro-batches."""
    keep_freed_memory()
    values = {"parallel.pp": world_size, "parallel.dp": 1, "parallel.sequence_parallel": False}
    trainer = Trainer(step_config(prefix, **values, **{"train.micro_batch_size": 1}), rank)
    found = []
    for step in range(pairs + 1):
        dist.barrier()
        spans = trainer.step(step + 1).spans
        busy = sum(span.seconds for span in spans if span.kind in ("F", "B", "REDUCE"))
        phase = next(span.seconds for span in spans if span.kind == "phase")
        found.append(Phase(phase, busy, [(span.name, span.seconds) for span in spans if span.kind in KINDS]))
    trainer.close()
    return found[1:]


def covered(intervals: Sequence[tuple[float, float]]) -> float:
    """The length of the union."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
