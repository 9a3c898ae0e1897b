"""Gradient reduction in fewer bytes: what `parallel.grad_compression` puts in place of a bucket's exact sum over dp.

| name     | bytes per element, each way | what is lost                   | source                               |
|----------|-----------------------------|--------------------------------|--------------------------------------|
| none     | 4                           | nothing                        |                                      |
| bf16     | 2                           | summands and sum are rounded   |                                      |
| int8_ef  | 1 + 4/256                   | rounded more; error feedback   | Seide et al. 2014; Tang et al. 2021  |
| powersgd | 4 r (m + n) / (m n)         | rank > r; error feedback       | Vogels et al. 2019, algorithm 1      |

Sums are in fp32 in the order of ranks and every rank ends with the same bits. Error feedback adds what a step has
dropped to the next step's gradient; a checkpoint has it, see `megapar.parallel.carried`. A skipped step leaves it, and
powersgd's factors, as they were. What several tensor-parallel ranks hold alike (norms, biases,
replicated heads) is reduced exactly: their copies must stay equal.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megapar.mesh import Axis
from megapar.parallel.buffers import Bucket
from megapar.parallel.collectives import (
    Started,
    all_gather,
    all_reduce,
    start_all_reduce,
    start_all_to_all,
    start_reduce_scatter,
    wait_for,
)

BLOCK = 256  # elements that share a scale


@dataclass(frozen=True)
class Matrix:
    """A run of a bucket that may be compressed: `rows` x `columns` elements from `start` on."""

    start: int
    rows: int
    columns: int

    @property
    def stop(self) -> int:
        return self.start + self.rows * self.columns


class Waiting(Protocol):
    def wait(self) -> None: ...


@dataclass(frozen=True)
class Then:
    """Collectives in flight, and what is done once all are over."""

    works: Sequence[Started]
    finish: Callable[[], None]

    def wait(self) -> None:
        wait_for(self.works)
        self.finish()


class Reduction(Protocol):
    """Sums one bucket over dp, step after step.

    start(name, flat, into): flat [n] is this rank's gradient, and may be overwritten; `into` gets the sum: flat itself,
    or with ZeRO-1 this rank's slice [n/R]. sent: bytes that this rank has sent so far (a ring's, for an all-reduce).
    keep_if(finite): bool [1] on the device, the same on all ranks: whether what the last step leaves to the next one
    is kept, or what was there before that step is. Nothing waits for its value.
    sizes(zero): elements of what a step leaves to the next one, by kind: summand_error [n], what this rank has dropped
    of its gradients; sum_error [n/R], what it has dropped of its slice of the sum; factors, powersgd's Q one behind the
    other. carried(): these, flat; empty before the first step. resume(carried): begins with them.
    """

    sent: int

    def start(self, name: str, flat: Tensor, into: Tensor) -> Waiting: ...

    def keep_if(self, finite: Tensor) -> None: ...

    def sizes(self, zero: bool) -> dict[str, int]: ...

    def carried(self) -> dict[str, Tensor]: ...

    def resume(self, carried: Mapping[str, Tensor]) -> None: ...


class Carried:
    """Tensors that a step leaves to the next one, of the same shapes in every step; none before the first.

    Those of the step before are held until `keep_if` says which of the two stay.
    """

    def __init__(self, first: Sequence[Tensor] = ()) -> None:
        self.tensors, self._before = list(first), list[Tensor]()

    def replace(self, tensors: Sequence[Tensor]) -> None:
        self.tensors, self._before = list(tensors), self.tensors

    def keep_if(self, finite: Tensor) -> None:
        """finite: bool [1] on the device. Not so: back to what was there before `replace`, or else to zeros."""
        for at, new in enumerate(self.tensors):
            if self._before:
                torch.where(finite, new, self._before[at], out=new)
            else:
                new.masked_fill_(~finite, 0.0)
        self._before = []


class Exact:
    """The sum itself."""

    def __init__(self, axis: Axis) -> None:
        self.axis, self.sent = axis, 0

    def start(self, name: str, flat: Tensor, into: Tensor) -> Started:
        if into is flat:
            self.sent += ring_bytes(flat, self.axis)
            return start_all_reduce(name, flat, self.axis)
        self.sent += ring_bytes(flat, self.axis) // 2
        return start_reduce_scatter(name, into, flat, self.axis)

    def keep_if(self, finite: Tensor) -> None:
        pass

    def sizes(self, zero: bool) -> dict[str, int]:
        return {}

    def carried(self) -> dict[str, Tensor]:
        return {}

    def resume(self, carried: Mapping[str, Tensor]) -> None:
        assert not carried


class Bf16:
    """fp32 [.., n] as bytes, 2 for each element."""

    error_feedback = False

    @staticmethod
    def encode(x: Tensor) -> Tensor:
        return x.to(torch.bfloat16).view(torch.uint8)

    @staticmethod
    def decode(payload: Tensor, length: int) -> Tensor:
        return payload.view(torch.bfloat16).float()


class Int8:
    """fp32 [.., n] as bytes: one for each element, then a scale for each BLOCK of them, largest magnitude / 127."""

    error_feedback = True

    @staticmethod
    def encode(x: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % BLOCK))
        blocks = padded.unflatten(-1, (-1, BLOCK))
        scale = blocks.abs().amax(-1, keepdim=True) / 127
        values = (blocks / scale.where(scale > 0, 1.0)).round().to(torch.int8)
        return torch.cat([values.flatten(-2).view(torch.uint8), scale.squeeze(-1).contiguous().view(torch.uint8)], -1)

    @staticmethod
    def decode(payload: Tensor, length: int) -> Tensor:
        blocks = -(-length // BLOCK)
        values, scale = payload.split([blocks * BLOCK, blocks * 4], -1)
        values = values.contiguous().view(torch.int8).float().unflatten(-1, (-1, BLOCK))
        return (values * scale.contiguous().view(torch.float32).unsqueeze(-1)).flatten(-2)[..., :length]


class Coded:
    """Summands travel encoded to the rank that owns their slice, are added in fp32; the sum travels back encoded."""

    def __init__(self, codec: type[Bf16] | type[Int8], axis: Axis, matrices: Sequence[Matrix], size: int) -> None:
        self.codec, self.axis, self.size, self.sent = codec, axis, size, 0
        self.exact = gaps(matrices, size)
        self.summand_error, self.sum_error = Carried(), Carried()

    def keep_if(self, finite: Tensor) -> None:
        self.summand_error.keep_if(finite)
        self.sum_error.keep_if(finite)

    def sizes(self, zero: bool) -> dict[str, int]:
        if not self.codec.error_feedback:
            return {}
        return {"summand_error": self.size} | ({} if zero else {"sum_error": self.size // self.axis.size})

    def carried(self) -> dict[str, Tensor]:
        errors = {"summand_error": self.summand_error, "sum_error": self.sum_error}
        return {kind: error.tensors[0].flatten() for kind, error in errors.items() if error.tensors}

    def resume(self, carried: Mapping[str, Tensor]) -> None:
        self.summand_error = Carried([carried["summand_error"].view(self.axis.size, -1)])
        if "sum_error" in carried:
            self.sum_error = Carried([carried["sum_error"].view(1, -1)])

    def start(self, name: str, flat: Tensor, into: Tensor) -> Waiting:
        exact = _take(flat, self.exact)
        slices = flat.view(self.axis.size, -1)
        payload = self._encode(slices, self.summand_error)
        received = torch.empty_like(payload)
        self.sent += (self.axis.size - 1) * payload.shape[1] + ring_bytes(exact, self.axis)
        works = [
            start_all_reduce(f"{name}, exact part", exact, self.axis),
            start_all_to_all(name, received, payload, self.axis),
        ]

        def finish() -> None:
            mine = slices[self.axis.index]
            torch.sum(self.codec.decode(received, len(mine)), 0, out=mine)
            if into is flat:
                payload = self._encode(mine.unsqueeze(0), self.sum_error)
                self.sent += payload.numel() * (self.axis.size - 1)
                slices.copy_(self.codec.decode(all_gather(payload, self.axis), len(mine)))
            _put(flat, self.exact, exact)
            if into is not flat:
                into.copy_(mine)

        return Then(works, finish)

    def _encode(self, x: Tensor, error: Carried) -> Tensor:
        """Bytes of x and of the error, what was dropped before; it becomes what is dropped now."""
        if not self.codec.error_feedback:
            return self.codec.encode(x)
        x = x + error.tensors[0] if error.tensors else x
        payload = self.codec.encode(x)
        error.replace([x - self.codec.decode(payload, x.shape[-1])])
        return payload


class PowerSGD:
    """Every matrix M as P Q^T of rank r: P = M Q, orthonormal columns, Q = M^T P, each summed over dp.

    Q of a step is the next one's start. Small matrices, where the factors are no fewer numbers, are reduced exactly.
    """

    def __init__(self, axis: Axis, matrices: Sequence[Matrix], size: int, rank: int) -> None:
        self.axis, self.size, self.sent = axis, size, 0
        self.matrices = [one for one in matrices if rank * (one.rows + one.columns) < one.rows * one.columns]
        self.exact = gaps(self.matrices, size)
        generator = torch.Generator().manual_seed(0)  # the same on every rank
        q = [torch.randn(one.columns, min(rank, one.rows), generator=generator) for one in self.matrices]
        self.q, self.errors = Carried(q), Carried()

    def keep_if(self, finite: Tensor) -> None:
        self.q.keep_if(finite)
        self.errors.keep_if(finite)

    def sizes(self, zero: bool) -> dict[str, int]:
        factors = sum(q.numel() for q in self.q.tensors)
        return {"summand_error": self.size, "factors": factors} if factors else {}

    def carried(self) -> dict[str, Tensor]:
        if not self.errors.tensors:
            return {}
        error = self.errors.tensors[0].new_zeros(self.size)
        for view, one in zip(self._views(error), self.errors.tensors, strict=True):
            view.copy_(one)
        return {"summand_error": error, "factors": torch.cat([q.flatten() for q in self.q.tensors])}

    def resume(self, carried: Mapping[str, Tensor]) -> None:
        self.errors = Carried([view.clone() for view in self._views(carried["summand_error"])])
        parts = carried["factors"].split([q.numel() for q in self.q.tensors])
        self.q = Carried([part.view(q.shape) for part, q in zip(parts, self.q.tensors, strict=True)])

    def _views(self, flat: Tensor) -> list[Tensor]:
        """The matrices of a bucket."""
        return [flat[one.start : one.stop].view(one.rows, one.columns) for one in self.matrices]

    def start(self, name: str, flat: Tensor, into: Tensor) -> Waiting:
        exact = _take(flat, self.exact)
        self.q.tensors = [q.to(flat.device) for q in self.q.tensors]  # the first step's are the host's
        views = self._views(flat)
        if self.errors.tensors:
            torch._foreach_add_(views, self.errors.tensors)
        left = _Together([view @ q for view, q in zip(views, self.q.tensors, strict=True)], flat)
        self.sent += ring_bytes(exact, self.axis) + ring_bytes(left.flat, self.axis)
        works = [
            start_all_reduce(f"{name}, exact part", exact, self.axis),
            start_all_reduce(f"{name}, left factors", left.flat, self.axis),
        ]

        def finish() -> None:
            p = [torch.linalg.qr(one)[0] for one in left.parts]
            right = _Together([view.t() @ one for view, one in zip(views, p, strict=True)], flat)
            self.errors.replace([view - one @ q.t() for view, one, q in zip(views, p, right.parts, strict=True)])
            self.sent += ring_bytes(right.flat, self.axis)
            all_reduce(right.flat, self.axis)
            for view, one, q in zip(views, p, right.parts, strict=True):
                torch.mm(one, q.t(), out=view)
            self.q.replace([q.clone() for q in right.parts])
            _put(flat, self.exact, exact)
            if into is not flat:
                into.copy_(flat.view(self.axis.size, -1)[self.axis.index])

        return Then(works, finish)


class _Together:
    """Small matrices as views of one flat tensor, so that they are one collective."""

    def __init__(self, matrices: Sequence[Tensor], like: Tensor) -> None:
        self.flat = torch.cat([like.new_empty(0), *(one.reshape(-1) for one in matrices)])
        runs = self.flat.split([one.numel() for one in matrices]) if matrices else ()
        self.parts = [run.view(one.shape) for run, one in zip(runs, matrices, strict=True)]


def matrices_of(bucket: Bucket) -> list[Matrix]:
    """What may be compressed: matrices that no peer of the same stage holds too."""
    found = []
    for parameter, offset in bucket.offsets.items():
        for piece in parameter.pieces:
            shape = piece.shard.shape
            if len(shape) > 1 and piece.shard.unique:
                columns = torch.Size(shape[1:]).numel()
                found.append(Matrix(offset + piece.start * columns, shape[0], columns))
    return found


def reduction(method: str, axis: Axis, matrices: Sequence[Matrix], size: int, rank: int) -> Reduction:
    """The reduction of one bucket of `size` elements; rank: of powersgd's factors."""
    if method == "powersgd":
        return PowerSGD(axis, matrices, size, rank)
    if method in ("bf16", "int8_ef"):
        return Coded(Bf16 if method == "bf16" else Int8, axis, matrices, size)
    return Exact(axis)


def ring_bytes(x: Tensor, axis: Axis) -> int:
    """What a rank sends in a ring's all-reduce of x."""
    return 2 * x.numel() * x.element_size() * (axis.size - 1) // axis.size


def gaps(matrices: Sequence[Matrix], size: int) -> list[slice]:
    """The runs of [0, size) in none of the matrices."""
    ordered = sorted(matrices, key=lambda one: one.start)
    starts, stops = [0, *(one.stop for one in ordered)], [*(one.start for one in ordered), size]
    return [slice(start, stop) for start, stop in zip(starts, stops, strict=True) if start < stop]


def _take(flat: Tensor, runs: Sequence[slice]) -> Tensor:
    """A copy of these runs, one after the other; zeros in their place."""
    taken = torch.cat([flat.new_empty(0), *(flat[run] for run in runs)])
    for run in runs:
        flat[run] = 0.0
    return taken


def _put(flat: Tensor, runs: Sequence[slice], taken: Tensor) -> None:
    for run, part in zip(runs, taken.split([run.stop - run.start for run in runs]), strict=True):
        flat[run] = part
