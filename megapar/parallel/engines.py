"""How a matmul and its collective are run: one after the other, overlapped, or fused. `parallel.tp_overlap` chooses.

An engine has three operations on plain tensors; forward and backward of every tensor-parallel matmul are made of them
(`parallel/overlap.py`). Shapes are per rank, R is the size of the axis; x and w are matrices,
w maybe a transposed view.

| operation               | x        | w      | result                            |
|-------------------------|----------|--------|-----------------------------------|
| `matmul_all_reduce`     | [T, K]   | [K, N] | sum over ranks of x @ w, [T, N]    |
| `matmul_reduce_scatter` | [R*t, K] | [K, N] | this rank's rows of that sum, [t, N] |
| `all_gather_matmul`     | [t, K]   | [K, N] | (gathered x @ w [R*t, N], gathered x [R*t, K]) |

`meanwhile` is work of the same rank that needs no result of the operation (the weight gradient); it runs while the last
collectives are in flight.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, Protocol

from torch import Tensor

from megapar.config.errors import UserError
from megapar.kernels import NEEDS_TRITON, backend_of
from megapar.kernels.comm import matmul as fused
from megapar.kernels.comm.symmetric import NoSharedMemory, SymmetricMemory
from megapar.kernels.matmul import empty_matrix, matmul
from megapar.mesh import Axis
from megapar.parallel.collectives import (
    all_gather,
    all_reduce,
    reduce_scatter,
    start_all_gather_list,
    start_all_reduce,
    start_reduce_scatter,
    wait_for,
)

Operation = Literal["matmul_all_reduce", "matmul_reduce_scatter", "all_gather_matmul"]
Meanwhile = Callable[[], None]
# Rows of a piece. How a row is summed over K may depend on where it stands in a block of rows: with MKL, of 4 in fp64
# and the last 3 in fp32. Pieces of whole blocks have the bits of the whole.
ALIGNED = 8


class Engine(Protocol):
    """See the module's table."""

    def matmul_all_reduce(self, x: Tensor, w: Tensor, axis: Axis, meanwhile: Meanwhile) -> Tensor: ...
    def matmul_reduce_scatter(self, x: Tensor, w: Tensor, axis: Axis, meanwhile: Meanwhile) -> Tensor: ...
    def all_gather_matmul(self, x: Tensor, w: Tensor, axis: Axis) -> tuple[Tensor, Tensor]: ...


class Serial:
    """The collective after the matmul, or before it. The reference."""

    def __str__(self) -> str:
        return "serial"

    def matmul_all_reduce(self, x: Tensor, w: Tensor, axis: Axis, meanwhile: Meanwhile) -> Tensor:
        with axis.timeline.span("matmul", "matmul", fine=True):
            y = matmul(x, w)
        all_reduce(y, axis)
        meanwhile()
        return y

    def matmul_reduce_scatter(self, x: Tensor, w: Tensor, axis: Axis, meanwhile: Meanwhile) -> Tensor:
        with axis.timeline.span("matmul", "matmul", fine=True):
            summands = matmul(x, w)
        y = reduce_scatter(summands, axis)
        meanwhile()
        return y

    def all_gather_matmul(self, x: Tensor, w: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
        gathered = all_gather(x, axis)
        with axis.timeline.span("matmul", "matmul", fine=True):
            return matmul(gathered, w, aligned=True), gathered


class Chunked:
    """Rows in pieces: the collective of one is in flight while the next is multiplied.

    Any backend of torch.distributed, any shape; the same bits from run to run. Of two ranks the bits of `Serial`, where
    every rank's rows are a multiple of ALIGNED. From three ranks on gloo's all-reduce adds in an order that depends on
    where pieces begin. On CUDA collectives run on their group's own stream, and a wait holds up only what comes after.
    """

    def __init__(self, pieces: int) -> None:
        self.pieces = pieces

    def __str__(self) -> str:
        return f"chunked, {self.pieces} pieces"

    def matmul_all_reduce(self, x: Tensor, w: Tensor, axis: Axis, meanwhile: Meanwhile) -> Tensor:
        y = x.new_empty(len(x), w.shape[1])
        started = []
        for name, rows in self.cut(len(x)):
            with axis.timeline.span("matmul", f"matmul {name}", fine=True):
                matmul(x[rows], w, out=y[rows])
            started.append(start_all_reduce(f"all_reduce {name}", y[rows], axis))
        meanwhile()
        wait_for(started)
        return y

    def matmul_reduce_scatter(self, x: Tensor, w: Tensor, axis: Axis, meanwhile: Meanwhile) -> Tensor:
        t = len(x) // axis.size
        y, summands = x.new_empty(t, w.shape[1]), x.new_empty(len(x), w.shape[1])
        started = []
        for name, rows in self.cut(t):
            # every rank's rows of this piece, one rank's after another's: what reduce-scatter takes
            part = summands[axis.size * rows.start : axis.size * rows.stop]
            with axis.timeline.span("matmul", f"matmul {name}", fine=True):
                for block, into in zip(x.split(t), part.split(rows.stop - rows.start), strict=True):
                    matmul(block[rows], w, out=into)
            started.append(start_reduce_scatter(f"reduce_scatter {name}", y[rows], part, axis))
        meanwhile()
        wait_for(started)
        return y

    def all_gather_matmul(self, x: Tensor, w: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
        x, t, pieces = x.contiguous(), len(x), self.cut(len(x))
        gathered, y = x.new_empty(axis.size * t, x.shape[1]), empty_matrix(x, axis.size * t, w.shape[1])
        blocks, results = gathered.unflatten(0, (axis.size, t)), y.unflatten(0, (axis.size, t))
        started = [
            start_all_gather_list(f"all_gather {name}", [block[rows] for block in blocks], x[rows], axis)
            for name, rows in pieces
        ]
        with axis.timeline.span("matmul", "matmul of this rank's rows", fine=True):
            matmul(x, w, out=results[axis.index])
        peers = [rank for rank in range(axis.size) if rank != axis.index]
        for (name, rows), piece in zip(pieces, started, strict=True):
            piece.wait()
            with axis.timeline.span("matmul", f"matmul {name}", fine=True):
                for rank in peers:
                    matmul(blocks[rank][rows], w, out=results[rank][rows])
        return y, gathered

    def cut(self, rows: int) -> Sequence[tuple[str, slice]]:
        """(name, rows) of every piece; all begin at a multiple of ALIGNED, and none is empty."""
        step = max(1, -(-rows // (ALIGNED * self.pieces))) * ALIGNED
        starts = range(0, rows, step)
        stops = [*starts[1:], rows] if rows else []
        return [
            (f"{i}/{len(starts)}", slice(*bounds)) for i, bounds in enumerate(zip(starts, stops, strict=True), start=1)
        ]


class Symmetric:
    """Triton kernels that write to their peers' memory, tile by tile (`kernels/comm`).

    Sums are in fp32 in the order of ranks, so all ranks have the same bits, in every run. With two ranks they are those
    of `Serial` where that multiplies with the same kernel. Waits are inside kernels: what is timed as waiting is
    from the end of the product and of `meanwhile` to that of the sums; an all-gather's waits count as its matmul.
    """

    def __init__(self, memory: SymmetricMemory) -> None:
        self.memory = memory

    def __str__(self) -> str:
        return "symmetric"

    def matmul_all_reduce(self, x: Tensor, w: Tensor, axis: Axis, meanwhile: Meanwhile) -> Tensor:
        with axis.timeline.span("matmul", "matmul", fine=True), sharing_memory():
            finish = fused.start_matmul_all_reduce(x, w, self.memory)
        meanwhile()
        with axis.blocked("all_reduce"):
            return finish()

    def matmul_reduce_scatter(self, x: Tensor, w: Tensor, axis: Axis, meanwhile: Meanwhile) -> Tensor:
        with axis.timeline.span("matmul", "matmul", fine=True), sharing_memory():
            finish = fused.start_matmul_reduce_scatter(x, w, self.memory)
        meanwhile()
        with axis.blocked("reduce_scatter"):
            return finish()

    def all_gather_matmul(self, x: Tensor, w: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
        with axis.timeline.span("matmul", "matmul of gathered rows", f" over {axis.name}", fine=True), sharing_memory():
            return fused.all_gather_matmul(x, w, self.memory)


@contextmanager
def sharing_memory() -> Iterator[None]:
    """Inside, ranks that can't share memory are an error that the user can mend."""
    try:
        yield
    except NoSharedMemory as error:
        raise UserError(str(error)) from None


# What `auto` takes: device -> (bytes that a rank sends in the collective, from which on) -> pieces of `Chunked`, 1 for
# `Serial`. The bytes follow from the collective and the ranks (`bytes_sent`).
# cpu: `megapar bench overlap subject=[layer] rate=[0]` on two cores, where a transfer takes a core too: at 0.5 MB
# chunked took 1.25 times as long as serial, at 4 MB 0.97 to 1.03 times. A slow network gains from less, but a table
# does not know it. cuda: serial until a GPU has measured it; others' pipelined all-gather + matmul lost by 2 to 4 times
# at 1024 rows (kraken, pull request 19), fused reduce-scatter by 2.6 to 3.3 times up to 384 rows (pytorch issue
# 179770). `Symmetric` is taken by name only: no GPU has run it yet.
PIECES = {"cpu": ((0, 1), (2 << 20, 4)), "cuda": ((0, 1),)}


def bytes_sent(operation: Operation, x: Tensor, w: Tensor, ranks: int) -> float:
    """Bytes that a rank sends in a ring's form of an operation's collective on x [.., K] and w [K, N]."""
    columns = x.shape[1] if operation == "all_gather_matmul" else w.shape[1]
    passes = {"all_gather_matmul": ranks, "matmul_reduce_scatter": 1, "matmul_all_reduce": 2}[operation]
    return passes * len(x) * columns * x.element_size() * (ranks - 1) / ranks


def choose(
    requested: str,
    operation: Operation,
    x: Tensor,
    w: Tensor,
    ranks: int,
    *,
    device: str | None = None,
    memory: Callable[[], SymmetricMemory] | None = None,
) -> Engine:
    """The engine that `parallel.tp_overlap=requested` means for an operation on x [.., K] and w [K, N].

    device: whose table counts; default: that of x. memory: the ranks' shared memory, made when it is first asked for.
    Raises UserError where `symmetric` can't run.
    """
    if requested == "serial":
        return Serial()
    if requested == "symmetric":
        if memory is None or backend_of("matmul", x.device.type, x.dtype) == "torch":
            raise UserError(f"parallel.tp_overlap=symmetric: {NEEDS_TRITON}")
        return Symmetric(memory())
    sent = bytes_sent(operation, x, w, ranks)
    pieces = [pieces for least, pieces in PIECES[device or x.device.type] if sent >= least][-1]
    if requested == "chunked":
        return Chunked(max(2, pieces))
    return Chunked(pieces) if pieces > 1 else Serial()
