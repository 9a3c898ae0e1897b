"""Whether a kernel's outputs are right: how far they are from fp64, and whether they are the same every time."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from experiments.gpu.run import Run, last_line

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# (wrong beyond, expected at most) of ||out - ref|| / ||ref||. One tf32 product in place of three would make 3e-4;
# tensor cores cut their sums off, so fp32 sums over thousands may pass 2e-6 and still be right.
Bound = tuple[float, float]
BOUNDS: dict[str, Bound] = {"fp32": (3e-5, 2e-6), "bf16": (4e-3, 4e-3), "fp16": (6e-4, 6e-4)}
SUMS: Bound = (1e-5, 2e-6)  # what is in fp32 whatever the inputs are: losses, statistics, gradients of weights
Outputs = Mapping[str, Tensor]


def distance(found: Tensor, exact: Tensor | Callable[[int, int], Tensor], rows: int = 0) -> float:
    """||found - exact|| / ||exact||. inf where shapes or infinities differ; NaN stays NaN.

    exact: a tensor, or with `rows` a function of (first, last) row, so that the whole need not exist in fp64.
    """
    if callable(exact):
        parts = [(found[i : i + rows], exact(i, min(i + rows, len(found)))) for i in range(0, len(found), rows)]
    else:
        parts = [(found, exact)]
    total = size = 0.0
    for a, b in parts:
        if a.shape != b.shape:
            return math.inf
        a, b = a.detach().double(), b.detach().double()
        hidden = b.isinf()
        if bool((a[hidden] != b[hidden]).any()):
            return math.inf
        a, b = a.masked_fill(hidden, 0.0), b.masked_fill(hidden, 0.0)
        total += float((a - b).square().sum())
        size += float(b.square().sum())
    return math.sqrt(total / size) if size else math.sqrt(total)


def same_bits(xs: Any, ys: Any) -> bool:
    def flat(x: Tensor) -> Tensor:
        return x.detach().contiguous().reshape(-1).view(torch.uint8)

    return all(torch.equal(flat(x), flat(y)) for x, y in zip(xs, ys, strict=True))


def trial(
    run: Run, check: str, call: Callable[[], Outputs], exact: Callable[[], Outputs],
    bounds: Bound | Mapping[str, Bound], plain: Callable[[], Outputs] | None = None,
) -> None:  # fmt: skip
    """One check: every output of a call against fp64, and three calls beside other work against each other.

    plain() -> what torch makes of it in the same dtype: ours are expected to be at most half as much again from fp64.
    """
    outs = []
    for _ in range(3 if run.cuda else 2):
        run.noise()
        outs.append(call())
    run.sync()
    judge(run, check, outs, exact(), bounds, plain)


def judge(
    run: Run, check: str, outs: list[Outputs], truth: Outputs, bounds: Bound | Mapping[str, Bound],
    plain: Callable[[], Outputs] | None = None,
) -> None:  # fmt: skip
    """The row of a check whose outputs are there: the one that is nearest to its bound, or beyond it."""
    errors = {name: distance(out, truth[name]) for name, out in outs[0].items()}
    worst: tuple[float, float, Bound] = (-1.0, 0.0, (1.0, 1.0))
    for name, error in errors.items():
        bound = bounds[name] if isinstance(bounds, Mapping) else bounds
        if not error / bound[0] <= worst[0]:  # NaN is the worst
            worst = (error / bound[0], error, bound)
    note = " ".join(f"{name} {error:.1e}" for name, error in errors.items()) if len(errors) > 1 else ""
    if plain is not None:
        note += beside_torch(run, check, errors, truth, plain)
    if not all(same_bits(outs[0].values(), out.values()) for out in outs[1:]):
        run.row(f"{check}, repeated", False, note=f"{len(outs)} runs gave different bits")
    run.within(check, worst[1], *worst[2], note=note)


def beside_torch(run: Run, check: str, errors: dict[str, float], truth: Outputs, plain: Callable[[], Outputs]) -> str:
    """What torch's own outputs are from fp64, as a note; a row where ours are half as much again."""
    try:
        others = {name: distance(x, truth[name]) for name, x in plain().items()}
    except Exception as error:
        return f" torch: {last_line(error)[:80]}"
    note = " torch " + " ".join(f"{error:.1e}" for error in others.values())
    more = max((errors[name] / other for name, other in others.items() if other), default=0.0)
    if more > 1.5:
        run.row(f"{check}, beside torch", True, more, "x", 1.5, False, note=note)
    return note
