"""What this card can do: a copy, a bf16 product and an fp32 one; and two things that a launcher relies on."""

import subprocess
import sys

import torch

from experiments.gpu.run import Run, deterministic
from experiments.gpu.section import Section

ROOM = 1 << 30, 1 << 12  # elements of the copy, on a card and in a rehearsal
COPY, PRODUCT = "copy", "bf16 product"  # the rows that floors are fractions of
FP32 = "fp32 product"


def ceilings(run: Run) -> None:
    if run.cuda:
        found = torch.cuda.get_device_properties(0)  # card-only
        memory, processors = found.total_memory >> 30, found.multi_processor_count  # card-only
        note = f"CUDA {torch.version.cuda}, {processors} processors, {memory} GiB"  # card-only
        met = (found.major, found.minor) == (9, 0)  # card-only
        run.row("compute capability", True, float(f"{found.major}.{found.minor}"), "", 9.0, met, note=note)  # card-only
    run.attempt(COPY, copy, run)
    size = 8192 if run.cuda else 64
    run.attempt(PRODUCT, product, run, PRODUCT, size, torch.bfloat16, 600.0)
    run.attempt(FP32, product, run, FP32, size // 2, torch.float32)
    run.attempt("the fork server leaves CUDA alone", untouched, run)
    run.attempt("torch.mm under deterministic algorithms", products, run)


def copy(run: Run) -> None:
    """Read and written, 4 bytes of traffic for an element."""
    elements = ROOM[not run.cuda]
    x = run.randn(elements, dtype=torch.bfloat16)
    y = torch.empty_like(x)
    run.rate(COPY, 4e-6 * elements / run.bench(lambda: y.copy_(x)), "GB/s", 2500.0)
    run.row("the copy is the same", torch.equal(x, y))


def product(run: Run, check: str, size: int, dtype: torch.dtype, floor: float | None = None) -> None:
    a, b = (run.randn(size, size, dtype=dtype) for _ in range(2))
    run.rate(check, 2e-9 * size**3 / run.bench(lambda: a @ b), "TFLOP/s", floor)


def untouched(run: Run) -> None:
    """A process that forks ranks must not have made a CUDA context: they could not use theirs."""
    code = "import megapar.launch.preload, torch; print(torch.cuda.is_initialized())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    run.row("the fork server leaves CUDA alone", said.stdout.split()[-1:] == ["False"], note=said.stderr[-200:])


def products(run: Run) -> None:
    """Without CUBLAS_WORKSPACE_CONFIG."""
    deterministic()
    for dtype in (torch.bfloat16, torch.float64):
        w = run.randn(64, 64, dtype=dtype)
        (w @ w).sum().item()
    run.row("torch.mm under deterministic algorithms", True)


SECTION = Section("ceilings", wave=1, seconds=30, run=ceilings)
