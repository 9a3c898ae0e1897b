"""Products in every layout, with every epilogue, into slices, added in place, and of lengths that TMA can't read."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.gpu.compare import BOUNDS, DTYPES, trial
from experiments.gpu.run import Run
from experiments.gpu.section import Section
from megapar.kernels import use_backend
from megapar.kernels._common import aligned_matrix
from megapar.kernels.matmul import ACTIVATIONS, add_matmul
from megapar.kernels.matmul import matmul as product

LAYOUTS = ("nt", "nn", "tn", "tt")  # n: an operand's rows lie together; t: its columns do
BESIDE = 24  # columns of a wider matrix that an output in a slice of it must leave alone
UNTOUCHED = -7.0


@dataclass(frozen=True)
class Product:
    """A product [M, K] @ [K, N] with an epilogue. offset: elements by which operands are off their alignment."""

    dtype: str
    layout: str
    M: int
    K: int
    N: int
    bias: bool = False
    activation: str | None = None
    residual: bool = False
    out: str = ""  # slice: of a wider matrix; residual: in its place; aligned: rows apart, as TMA wants them
    offset: int = 0

    def __str__(self) -> str:
        words = [self.dtype, self.layout, f"{self.M}x{self.K}x{self.N}", "bias" * self.bias, self.activation or ""]
        words += ["residual" * self.residual, f"out={self.out}" * bool(self.out), "misaligned" * bool(self.offset)]
        return " ".join(filter(None, words))


@dataclass(frozen=True)
class Added:
    """A product added in place to a matrix of dtype `into`, whose columns lie together if transposed; or written there,
    whatever it held. aligned: the rows of a lie apart, as those of a gradient of logits do."""

    dtype: str
    into: str
    M: int
    K: int
    N: int
    transposed: bool = False
    write: bool = False
    aligned: bool = False

    def __str__(self) -> str:
        words = ["write" if self.write else "add", self.dtype, "into", self.into, f"{self.M}x{self.K}x{self.N}"]
        return " ".join(words) + " transposed" * self.transposed + " aligned" * self.aligned


# fmt: off
CASES = [
    *(Product("bf16", layout, 4096, 4096, 4096) for layout in LAYOUTS),
    Added("bf16", "fp32", 4096, 1000, 4096),
    Product("bf16", "nt", 1000, 4096, 1000, bias=True, activation="gelu"),
    Product("bf16", "nt", 1000, 1000, 4096, activation="silu", residual=True, out="residual"),
    Product("bf16", "nt", 4096, 128, 4096, bias=True, activation="relu", residual=True, out="slice"),
    Product("bf16", "nt", 1000, 768, 50257),
    Product("bf16", "nt", 1000, 768, 50257, out="aligned"),
    Product("bf16", "nn", 1000, 50257, 768),
    Added("bf16", "fp32", 50257, 1000, 768),
    Added("bf16", "fp32", 50257, 1000, 768, aligned=True),
    Added("bf16", "fp32", 4096, 1000, 4096, write=True),
    *(Product("fp32", layout, 1000, 1000, 4096) for layout in LAYOUTS),
    *(Product("bf16", layout, 128, 1000, 128) for layout in LAYOUTS),
    *(Product("bf16", layout, 17, 17, 1000) for layout in LAYOUTS),
    Product("fp32", "nt", 128, 4096, 4096, bias=True, activation="gelu", residual=True),
    Product("fp32", "nt", 4096, 4096, 128),
    Product("bf16", "nt", 1, 4096, 17, out="slice"),
    Product("bf16", "nt", 128, 1000, 1),
    Product("fp16", "nt", 1000, 4096, 1000, bias=True, activation="silu"),
    Product("bf16", "nt", 1000, 1000, 1000, offset=1),
    Added("bf16", "bf16", 1000, 4096, 128),
    Added("bf16", "fp32", 1000, 128, 4096, True),
    Added("fp32", "fp32", 128, 1000, 4096),
    Added("fp32", "fp32", 128, 1000, 4096, True, write=True),
]
REHEARSED = [
    *(Product("bf16", layout, 17, 40, 24) for layout in LAYOUTS),
    Product("fp32", "nt", 17, 20, 25, bias=True, activation="gelu", residual=True, out="slice"),
    Product("bf16", "nn", 16, 32, 24, residual=True, out="residual"),
    Product("fp16", "nt", 16, 32, 24, offset=1),
    Product("bf16", "nt", 16, 32, 25, out="aligned"),
    Added("bf16", "fp32", 17, 20, 24),
    Added("bf16", "bf16", 17, 20, 24, True, write=True),
    Added("bf16", "fp32", 25, 20, 24, aligned=True),
]
# fmt: on


def matmul(run: Run) -> None:
    use_backend(run.backend)
    run.poison()
    run.attempt("first launch", first_launch, run)
    for case in CASES if run.cuda else REHEARSED:
        run.attempt(str(case), multiplied if isinstance(case, Product) else added, run, case)


def first_launch(run: Run) -> None:
    """Whether what `compile` compiled is what a launch looks for: if not, this takes seconds."""
    rows, columns, inner = (4096, 14336, 4096) if run.cuda else (16, 16, 16)
    a, b = run.randn(rows, inner, dtype=torch.bfloat16), run.randn(columns, inner, dtype=torch.bfloat16)
    start = time.monotonic()
    product(a, b.t())
    run.sync()
    run.rate("first launch of a kernel that was compiled ahead", 1e3 * (time.monotonic() - start), "ms")


def operand(run: Run, rows: int, columns: int, dtype: str, by_row: bool, scale: float = 1.0, offset: int = 0) -> Tensor:
    x = run.randn(rows * columns + offset, dtype=DTYPES[dtype], scale=scale)[offset:]
    return x.view(rows, columns) if by_row else x.view(columns, rows).t()


def multiplied(run: Run, case: Product) -> None:
    dtype, M, K, N = case.dtype, case.M, case.K, case.N
    a = operand(run, M, K, dtype, case.layout[0] == "n", 1.0, case.offset)
    b = operand(run, K, N, dtype, case.layout[1] == "n", K**-0.5, case.offset)
    bias = run.randn(N, dtype=DTYPES[dtype]) if case.bias else None
    residual = run.randn(M, N, dtype=DTYPES[dtype]) if case.residual else None

    def ours() -> dict[str, Tensor]:
        if case.out in ("", "aligned"):
            aligned = case.out == "aligned"
            return {"y": product(a, b, bias=bias, activation=case.activation, residual=residual, aligned=aligned)}
        if case.out == "residual":
            assert residual is not None
            place = residual.clone()
            return {"y": product(a, b, bias=bias, activation=case.activation, residual=place, out=place)}
        wide = torch.full((M, N + BESIDE), UNTOUCHED, dtype=DTYPES[dtype], device=run.device)
        inside = wide[:, 8 : 8 + N]
        product(a, b, bias=bias, activation=case.activation, residual=residual, out=inside)
        outside = torch.cat([wide[:, :8], wide[:, 8 + N :]], 1)
        assert bool((outside == UNTOUCHED).all()), "columns beside the output were written"
        return {"y": inside}

    def formula(double: bool) -> dict[str, Tensor]:
        x, y, beta, rest = (t if t is None or not double else t.double() for t in (a, b, bias, residual))
        assert x is not None and y is not None
        out = x @ y if beta is None else x @ y + beta
        out = out if case.activation is None else ACTIVATIONS[case.activation](out)
        return {"y": out if rest is None else out + rest}

    plain = None if dtype == "fp32" else lambda: formula(False)
    trial(run, str(case), ours, lambda: formula(True), BOUNDS[dtype], plain)


def added(run: Run, case: Added) -> None:
    a = operand(run, case.M, case.K, case.dtype, False)
    if case.aligned:
        a = aligned_matrix(a, case.K, case.M).copy_(a.t()).t()
    b = operand(run, case.K, case.N, case.dtype, True)
    start = operand(run, case.M, case.N, case.into, not case.transposed)

    def ours() -> dict[str, Tensor]:
        total = start.clone(memory_format=torch.preserve_format)
        if case.write:
            total.fill_(torch.nan)
        add_matmul(total, a, b, accumulate=not case.write)
        return {"total": total}

    exact = a.double() @ b.double() if case.write else start.double() + a.double() @ b.double()
    trial(run, str(case), ours, lambda: {"total": exact}, BOUNDS[case.into])


SECTION = Section("matmul", wave=2, seconds=100, run=matmul, environment={"CUBLAS_WORKSPACE_CONFIG": ":4096:8"})
