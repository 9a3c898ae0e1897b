"""Cross entropy over a vocabulary that is split over ranks, as two passes over each rank's logits.

`cross_entropy_statistics` reads them once; what it returns is small, is gathered from all ranks and merged by
`merge_statistics`. `cross_entropy_gradient_` reads them a second time and puts the gradient in their place. In 16 bits
that is 6 bytes per logit and one collective. The softmax itself is never stored.

Shape letters: T tokens, V columns of this rank's part of the vocabulary, which begins at id `first`, R ranks.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megapar.kernels import backend_of
from megapar.kernels._common import (
    Launch,
    aligned_matrix,
    cast,
    device_function,
    floating,
    next_power_of_2,
    num_tiles,
    overlaps_itself,
    rows_of,
    tl,
    triton,
    wide_dtype,
)
from megapar.kernels._operators import call, custom_op
from megapar.kernels.registry import Kernel
from megapar.kernels.shapes import DEMO, GPT2, LLAMA

COLUMNS, WARP = 4096, 512  # of a program's tile, and of a warp: 128 bits for each thread and load


class Objective(NamedTuple):
    """What a token costs, in nats.

    smoothing: share of the target's probability that is spread over the vocabulary (Szegedy et al. 2016, section 7)
    z: weight of the square of the log of the softmax's denominator (Chowdhery et al. 2022, section 5)
    vocabulary: ids in all, over which smoothing spreads
    """

    smoothing: float = 0.0
    z: float = 0.0
    vocabulary: int = 1


PLAIN = Objective()


class Merged(NamedTuple):
    """Of every token, over the whole vocabulary, [T] each, at least fp32: the log of the softmax's denominator, the
    target's logit, the sum of the logits where smoothing needs it."""

    log_sum: Tensor
    target: Tensor
    total: Tensor | None

    def losses(self, objective: Objective) -> Tensor:
        """[T]"""
        smoothing, z, vocabulary = objective
        losses = self.log_sum - (1 - smoothing) * self.target
        if self.total is not None:
            losses = losses - smoothing / vocabulary * self.total
        return losses + z * self.log_sum.square() if z else losses


def cross_entropy_statistics(logits: Tensor, targets: Tensor, first: int, total: bool = False) -> Tensor:
    """[T, 3]: largest logit, sum of exp(logit - largest), the target's logit or 0 where it is elsewhere.

    logits [T, V], V > 0, any floating dtype; -inf hides one, and where a part has no other its sum is 0. targets [T]
    int64, ids of the whole vocabulary. total: a fourth column is the sum of the logits. In fp32, or fp64 for fp64. Not
    differentiable: see `cross_entropy_gradient_`.
    """
    _check(logits, targets)
    if backend_of("cross_entropy", logits.device.type, logits.dtype) != "torch":
        return call(cross_entropy_statistics_op, logits, targets, first, total)
    wide = logits.to(wide_dtype(logits))
    largest = wide.amax(1)
    base = largest.masked_fill(largest == -torch.inf, 0.0)  # all may be hidden: -inf minus -inf
    sums = torch.exp(wide - base.unsqueeze(1)).sum(1)
    inside = (targets >= first) & (targets < first + logits.shape[1])
    target = wide.gather(1, (targets - first).where(inside, 0).unsqueeze(1)).squeeze(1).where(inside, 0.0)
    return torch.stack([largest, sums, target, *([wide.sum(1)] if total else [])], 1)


def merge_statistics(parts: Tensor) -> Merged:
    """Statistics [R, T, 3 or 4] of all parts of the vocabulary, merged in the order of ranks: the same bits on each."""
    largest, sums, target, *total = parts.unbind(2)
    highest = largest.amax(0)
    log_sum = highest + torch.log((sums * torch.exp(largest - highest)).sum(0))
    return Merged(log_sum, target.sum(0), total[0].sum(0) if total else None)


def cross_entropy_gradient_(
    logits: Tensor, targets: Tensor, first: int, log_sum: Tensor, grad: Tensor, objective: Objective
) -> Tensor:
    """Overwrite logits [T, V] with their gradient, in their dtype, and return them.

    log_sum [T] as merged, grad [T] of the losses; a token whose grad is 0 gets zeros. As a mutation it makes torch
    refuse a second backward through the same logits.
    """
    _check(logits, targets)
    if overlaps_itself(logits):
        raise ValueError(f"logits {list(logits.shape)} with strides {logits.stride()}: need memory for every element")
    if not log_sum.shape == grad.shape == targets.shape or not floating(log_sum, grad):
        raise ValueError(
            f"log_sum {list(log_sum.shape)} {log_sum.dtype}, grad {list(grad.shape)} {grad.dtype}: need "
            f"{list(targets.shape)} twice, floating"
        )
    if backend_of("cross_entropy", logits.device.type, logits.dtype) != "torch":
        call(cross_entropy_gradient_op, logits, targets, first, log_sum, grad.contiguous(), *objective)
        return logits
    smoothing, z, vocabulary = objective
    wide = logits if logits.dtype == wide_dtype(logits) else logits.to(wide_dtype(logits))
    wide = torch.exp(wide.sub_(log_sum.unsqueeze(1)), out=wide)
    if z:
        wide.mul_((1 + 2 * z * log_sum).unsqueeze(1))
    if smoothing:
        wide.sub_(smoothing / vocabulary)
    inside = (targets >= first) & (targets < first + logits.shape[1])
    local = (targets - first).where(inside, 0).unsqueeze(1)
    wide.scatter_add_(1, local, (smoothing - 1) * inside.to(wide.dtype).unsqueeze(1))
    wide.mul_(grad.unsqueeze(1)).index_fill_(0, (grad == 0).nonzero().squeeze(1), 0.0)  # 0 times NaN is NaN
    return logits if wide is logits else logits.copy_(wide)


def _check(logits: Tensor, targets: Tensor) -> None:
    fits = logits.dim() == 2 and targets.shape == logits.shape[:1] and logits.shape[1]
    if not fits or targets.dtype != torch.int64 or not logits.is_floating_point():
        raise ValueError(
            f"logits {list(logits.shape)} {logits.dtype}, targets {list(targets.shape)} {targets.dtype}: need floating "
            "[T, V] with V > 0 and int64 [T]"
        )


# -------------------------------------------------------------------------------------------------------------- kernels


def _metadata(passes: int, flops: float) -> Any:
    """launch_metadata: passes over the logits, and operations for each; what there is per token is not counted."""

    def describe(grid: Any, kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
        logits = args["logits"]
        moved = passes * logits.numel() * logits.element_size()
        return {"name": kernel.name, "flops32": flops * logits.numel(), "bytes": moved}

    return describe


@device_function
def _fold(x, largest, sums):
    """(largest, sum of exponentials) of every lane with another vector of logits x [lanes, vector].

    A vector is a thread's own, and lanes meet only at the end: nothing is exchanged between threads before.
    """
    higher = tl.maximum(largest, tl.max(x, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)  # all may be hidden so far: -inf minus -inf
    sums = sums * tl.exp(largest - base) + tl.sum(tl.exp(x - base[:, None]), 1)
    return higher, sums


@triton.jit(launch_metadata=_metadata(1, 4.0), do_not_specialize=["first"])
def cross_entropy_statistics_kernel(
    logits, targets, statistics, first, num_columns, stride,
    TOTAL: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """statistics [T, 3], or [T, 4] with TOTAL. Grid: a program per token, which goes over its row once.

    Tiles that exist as a whole are read without a mask, which would cut a thread's loads into single logits.
    """
    row = tl.cast(tl.program_id(0), tl.int64)
    logits += row * stride
    lanes = tl.arange(0, COLUMNS // VECTOR)
    columns = lanes[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    largest = tl.full([COLUMNS // VECTOR], float("-inf"), tl.float32)
    sums, total = tl.zeros([COLUMNS // VECTOR], tl.float32), tl.zeros([COLUMNS // VECTOR], tl.float32)
    whole = num_columns // COLUMNS * COLUMNS
    for start in tl.range(0, whole, COLUMNS):
        x = tl.load(logits + start + columns).to(tl.float32)
        largest, sums = _fold(x, largest, sums)
        if TOTAL:
            total += tl.sum(x, 1)
    if whole < num_columns:
        exists = whole + columns < num_columns
        x = tl.load(logits + whole + columns, mask=exists, other=float("-inf")).to(tl.float32)
        largest, sums = _fold(x, largest, sums)
        if TOTAL:
            total += tl.sum(tl.where(exists, x, 0.0), 1)
    highest = tl.max(largest, 0)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    place = tl.load(targets + row) - first
    inside = (place >= 0) & (place < num_columns)
    target = tl.load(logits + place, mask=inside, other=0.0).to(tl.float32)
    statistics += row * (4 if TOTAL else 3)
    tl.store(statistics, highest)
    tl.store(statistics + 1, tl.sum(sums * tl.exp(largest - base), 0))
    tl.store(statistics + 2, target)
    if TOTAL:
        tl.store(statistics + 3, tl.sum(total, 0))


@device_function
def _gradient(x, columns, place, log_sum, grad, smoothing, z, spread):
    gradient = tl.exp(x - log_sum) * (1.0 + 2.0 * z * log_sum) - spread
    gradient = tl.where(columns == place, gradient - (1.0 - smoothing), gradient) * grad
    return tl.where(grad == 0.0, 0.0, gradient)  # a token without a gradient may have any logits


@triton.jit(launch_metadata=_metadata(2, 3.0), do_not_specialize=["first"])
def cross_entropy_gradient_kernel(
    logits, targets, log_sums, grads, first, smoothing, z, spread, num_columns, stride, COLUMNS: tl.constexpr
):
    """Overwrites logits. Grid: tokens, tiles of columns. spread: what smoothing takes from every probability."""
    row = tl.cast(tl.program_id(0), tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    place, log_sum, grad = tl.load(targets + row) - first, tl.load(log_sums + row), tl.load(grads + row)
    logits += row * stride + columns
    if (tl.program_id(1) + 1) * COLUMNS <= num_columns:  # without a mask of columns, see above
        x = tl.load(logits).to(tl.float32)
        gradient = _gradient(x, columns, place, log_sum, grad, smoothing, z, spread)
        tl.store(logits, cast(gradient, logits.dtype.element_ty))
    else:
        exists = columns < num_columns
        x = tl.load(logits, mask=exists, other=float("-inf")).to(tl.float32)
        gradient = _gradient(x, columns, place, log_sum, grad, smoothing, z, spread)
        tl.store(logits, cast(gradient, logits.dtype.element_ty), mask=exists)


# ------------------------------------------------------------------------------------------------------------- launches


def launch_statistics(logits: Tensor, targets: Tensor, statistics: Tensor, first: int) -> Launch:
    tensors = {"logits": logits, "targets": targets, "statistics": statistics}
    numbers = {"first": first, "TOTAL": statistics.shape[1] == 4, "VECTOR": 16 // logits.element_size()}
    return _launch(cross_entropy_statistics_kernel, (len(logits),), tensors, **numbers)


def launch_gradient(
    logits: Tensor, targets: Tensor, log_sum: Tensor, grad: Tensor, first: int, objective: Objective
) -> Launch:
    smoothing, z, vocabulary = objective
    tensors = {"logits": logits, "targets": targets, "log_sums": log_sum, "grads": grad}
    grid = (len(logits), num_tiles(logits.shape[1], _columns(logits)))
    numbers = {"first": first, "smoothing": smoothing, "z": z, "spread": smoothing / vocabulary}
    return _launch(cross_entropy_gradient_kernel, grid, tensors, **numbers)


def _launch(kernel: Any, grid: tuple[int, ...], tensors: dict[str, Tensor], **numbers: float) -> Launch:
    logits = tensors["logits"]
    columns = _columns(logits)
    sizes = {"num_columns": logits.shape[1], "stride": logits.stride(0), "COLUMNS": columns}
    return Launch(kernel, grid, tensors | numbers | sizes, warps=max(1, min(8, columns // WARP)), stages=2)


def _columns(logits: Tensor) -> int:
    return min(COLUMNS, next_power_of_2(logits.shape[1]))


# ------------------------------------------------------------------------------------------------------------ operators


@custom_op("megapar::cross_entropy_statistics")
def cross_entropy_statistics_op(logits: Tensor, targets: Tensor, first: int, total: bool) -> Tensor:
    """[T, 3 or 4] in fp32; arguments checked by `cross_entropy_statistics`."""
    statistics = _statistics(logits, total)
    if len(logits):
        launch_statistics(rows_of(logits), targets.contiguous(), statistics, first).run()
    return statistics


@custom_op("megapar::cross_entropy_gradient_", mutates_args=("logits",))
def cross_entropy_gradient_op(
    logits: Tensor,
    targets: Tensor,
    first: int,
    log_sum: Tensor,
    grad: Tensor,
    smoothing: float,
    z: float,
    vocabulary: int,
) -> None:
    """Overwrites logits, whose rows must lie together each."""
    if not len(logits):
        return
    given = rows_of(logits)
    objective = Objective(smoothing, z, vocabulary)
    launch_gradient(given, targets.contiguous(), log_sum.contiguous(), grad.contiguous(), first, objective).run()
    if given.data_ptr() != logits.data_ptr():
        logits.copy_(given)


def _statistics(logits: Tensor, total: bool) -> Tensor:
    return logits.new_empty(len(logits), 4 if total else 3, dtype=torch.float32)


@cross_entropy_statistics_op.register_fake
def _(logits, targets, first, total):
    return _statistics(logits, total)


@cross_entropy_gradient_op.register_fake
def _(logits, targets, first, log_sum, grad, smoothing, z, vocabulary):
    return None


# ----------------------------------------------------------------------------------------------------------- inspection


def aot_specs(arch: str) -> dict[str, Launch]:
    """The launches by name for Llama-8B's and the demo's vocabularies, on tensors without storage."""
    specs = {}
    for sizes in (LLAMA, GPT2, DEMO):
        width, dtype = sizes.vocab, sizes.torch_dtype
        with torch.device("meta"):
            logits = aligned_matrix(torch.empty(0, dtype=dtype), 4096, width)
            targets = torch.empty(4096, dtype=torch.int64)
            statistics, column = torch.empty(4096, 3), torch.empty(4096)
        specs[f"cross_entropy_statistics_{width}"] = launch_statistics(logits, targets, statistics, 0)
        objective = Objective(0.1, 1e-4, width)
        specs[f"cross_entropy_gradient_{width}"] = launch_gradient(logits, targets, column, column, 0, objective)
    return specs


KERNEL = Kernel("cross_entropy", specs=aot_specs, place=6)
