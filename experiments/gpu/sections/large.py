"""More than 2^31 elements in one tensor: packed attention, cross entropy, SwiGLU, a product's output."""

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import silu

from experiments.gpu import references
from experiments.gpu.compare import BOUNDS, SUMS, distance
from experiments.gpu.run import Run
from experiments.gpu.section import Section
from megapar.kernels import cross_entropy as ce
from megapar.kernels import use_backend
from megapar.kernels.attention import attention
from megapar.kernels.matmul import matmul
from megapar.kernels.swiglu import swiglu

BF16 = torch.bfloat16
BOUND, EXPECTED = BOUNDS["bf16"]


def large(run: Run) -> None:
    use_backend(run.backend)
    for check in (losses, activation, products, packed):
        run.attempt(check.__name__, check, run)
        if run.cuda:
            torch.cuda.empty_cache()  # card-only


def losses(run: Run) -> None:
    T, V, piece = (20000, 128256, 500) if run.cuda else (6, 50, 3)
    logits = torch.cat([run.randn(T // 2, V, dtype=BF16) for _ in range(2)])
    targets, share = torch.randint(0, V, (T,), device=run.device), torch.rand(T, device=run.device)
    merged = ce.merge_statistics(ce.cross_entropy_statistics(logits, targets, 0).unsqueeze(0))
    loss, given = merged.losses(ce.PLAIN), logits.clone()
    gradient = ce.cross_entropy_gradient_(given, targets, 0, merged.log_sum, share, ce.PLAIN)

    def exact(which: int, first: int, last: int) -> Tensor:
        return references.cross_entropy(logits[first:last], targets[first:last], share[first:last])[which]

    for which, (name, out, bound) in enumerate((("loss", loss, SUMS[0]), ("gradient", gradient, BOUND))):
        away = distance(out, partial(exact, which), piece)
        run.within(f"cross entropy {T}x{V}, {name}", away, bound)


def activation(run: Run) -> None:
    T, width = (160000, 14336) if run.cuda else (20, 24)
    both = torch.empty(T, 2 * width, dtype=BF16, device=run.device).normal_()
    out = swiglu(both[:, :width], both[:, width:])

    def exact(first: int, last: int) -> Tensor:
        part = both[first:last].double()
        return silu(part[:, :width]) * part[:, width:]

    run.within(f"swiglu {T}x{width}", distance(out, exact, 4000), BOUND)


def products(run: Run) -> None:
    M, K, N = (140000, 64, 16384) if run.cuda else (20, 16, 24)
    a, b = run.randn(M, K, dtype=BF16), run.randn(N, K, dtype=BF16, scale=K**-0.5)
    away = distance(matmul(a, b.t()), lambda first, last: a[first:last].double() @ b.double().t(), 8000)
    run.within(f"product {M}x{K}x{N}", away, BOUND)


def packed(run: Run) -> None:
    """Sequences of one length: the first, some in the middle and the last ones against fp64, all for NaN."""
    count, length, N, D = (1024, 1024, 16, 128) if run.cuda else (4, 8, 2, 16)
    q, k, v, do = (torch.empty(count * length, N, D, dtype=BF16, device=run.device).normal_() for _ in range(4))
    cu = torch.arange(0, count * length + 1, length, dtype=torch.int32, device=run.device)
    given = [x.requires_grad_() for x in (q, k, v)]
    o = attention(*given, cu_seqlens_q=cu, cu_seqlens_k=cu)
    found = dict(zip(("o", "dq", "dk", "dv"), (o.detach(), *torch.autograd.grad(o, given, do)), strict=True))
    worst = 0.0
    for one in sorted({0, 1, count // 2, count - 2, count - 1}):
        here = slice(one * length, (one + 1) * length)
        a, b, c, d = (x.detach()[here] for x in (q, k, v, do))
        zero = torch.zeros(length, N, device=run.device)
        exact = references.attention(a, b, c, d, zero, [(0, length, 0, length)], True, None, None)
        away = [distance(x[here], exact[name]) for name, x in found.items()]
        worst = max(worst, *(x if math.isfinite(x) else math.inf for x in away))
    finite = all(bool(torch.isfinite(x.sum(dtype=torch.float32))) for x in found.values())
    value = worst if finite else math.inf
    run.within(f"packed attention {count * length}x{N}x{D}", value, 2.5 * BOUND, EXPECTED)


SECTION = Section("large", wave=6, seconds=50, run=large, environment={"CUBLAS_WORKSPACE_CONFIG": ":4096:8"})
