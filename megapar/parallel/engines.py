"""How a matmul and its collective are run: one after the other, or overlapped. `parallel.tp_overlap` chooses.

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

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

from torch import Tensor

from megapar.kernels.matmul import matmul
from megapar.mesh import Axis
from megapar.parallel.collectives import (
    all_gather,
    all_reduce,
    reduce_scatter,
    start_all_gather,
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
        with axis.timeline.span("matmul", "matmul"):
            y = matmul(x, w)
        all_reduce(y, axis)
        meanwhile()
        return y

    def matmul_reduce_scatter(self, x: Tensor, w: Tensor, axis: Axis, meanwhile: Meanwhile) -> Tensor:
        with axis.timeline.span("matmul", "matmul"):
            summands = matmul(x, w)
        y = reduce_scatter(summands, axis)
        meanwhile()
        return y

    def all_gather_matmul(self, x: Tensor, w: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
        gathered = all_gather(x, axis)
        with axis.timeline.span("matmul", "matmul"):
            return matmul(gathered, w), gathered


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
        for name, rows in self._pieces(len(x)):
            with axis.timeline.span("matmul", f"matmul {name}"):
                matmul(x[rows], w, out=y[rows])
            started.append(start_all_reduce(f"all_reduce {name}", y[rows], axis))
        meanwhile()
        wait_for(started)
        return y

    def matmul_reduce_scatter(self, x: Tensor, w: Tensor, axis: Axis, meanwhile: Meanwhile) -> Tensor:
        t = len(x) // axis.size
        y, summands = x.new_empty(t, w.shape[1]), x.new_empty(len(x), w.shape[1])
        started = []
        for name, rows in self._pieces(t):
            # every rank's rows of this piece, one rank's after another's: what reduce-scatter takes
            part = summands[axis.size * rows.start : axis.size * rows.stop]
            with axis.timeline.span("matmul", f"matmul {name}"):
                for block, into in zip(x.split(t), part.split(rows.stop - rows.start), strict=True):
                    matmul(block[rows], w, out=into)
            started.append(start_reduce_scatter(f"reduce_scatter {name}", y[rows], part, axis))
        meanwhile()
        wait_for(started)
        return y

    def all_gather_matmul(self, x: Tensor, w: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
        x, t, pieces = x.contiguous(), len(x), self._pieces(len(x))
        gathered, y = x.new_empty(axis.size * t, x.shape[1]), x.new_empty(axis.size * t, w.shape[1])
        blocks, results = gathered.split(t), y.split(t)
        started = [
            start_all_gather(f"all_gather {name}", [block[rows] for block in blocks], x[rows], axis)
            for name, rows in pieces
        ]
        with axis.timeline.span("matmul", "matmul of this rank's rows"):
            matmul(x, w, out=results[axis.index])
        peers = [rank for rank in range(axis.size) if rank != axis.index]
        for (name, rows), piece in zip(pieces, started, strict=True):
            piece.wait()
            with axis.timeline.span("matmul", f"matmul {name}"):
                for rank in peers:
                    matmul(blocks[rank][rows], w, out=results[rank][rows])
        return y, gathered

    def _pieces(self, rows: int) -> Sequence[tuple[str, slice]]:
        """(name, rows) of every piece; all begin at a multiple of ALIGNED, and none is empty."""
        step = max(1, -(-rows // (ALIGNED * self.pieces))) * ALIGNED
        starts = range(0, rows, step)
        stops = [*starts[1:], rows]
        return [
            (f"{i}/{len(starts)}", slice(*bounds)) for i, bounds in enumerate(zip(starts, stops, strict=True), start=1)
        ]


# Device -> (bytes that a rank's collective moves, from which on) -> pieces of `chunked`; 1: `Serial` is no slower.
# cpu: `megapar bench overlap subject=[layer] rate=[0]` on two cores, where a transfer takes a core too: at 1 MB chunked
# took 1.25 times as long as serial, at 8 MB 0.97 to 1.03 times. A slow network gains from less, but a table does not
# know it. cuda: not measured; from published figures of pipelined all-gather + matmul, which lose below a few MB.
PIECES = {"cpu": ((0, 1), (1 << 22, 4)), "cuda": ((0, 1), (1 << 23, 2), (1 << 25, 4))}


def choose(requested: str, operation: Operation, x: Tensor, w: Tensor, ranks: int, device: str | None = None) -> Engine:
    """The engine that `parallel.tp_overlap=requested` means for an operation on x [.., K] and w [K, N].

    device: whose table counts; default: that of x
    """
    if requested == "serial":
        return Serial()
    rows, columns = len(x), x.shape[1] if operation == "all_gather_matmul" else w.shape[1]
    moved = rows * columns * x.element_size() * (ranks if operation == "all_gather_matmul" else 1)
    pieces = [pieces for least, pieces in PIECES[device or x.device.type] if moved >= least][-1]
    if requested == "chunked":
        return Chunked(max(2, pieces))
    return Chunked(pieces) if pieces > 1 else Serial()
