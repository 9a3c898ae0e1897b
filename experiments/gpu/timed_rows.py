"""What `times` times of kernels that go over rows: they are bound by memory, and their ceiling is the copy."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.gpu.run import Run
from experiments.gpu.timing import Call, Timed, beside
from megapar.kernels import cross_entropy as ce
from megapar.kernels import layernorm as ln
from megapar.kernels import rmsnorm as rms
from megapar.kernels.dropout import dropout
from megapar.kernels.rope import rope, rope_table
from megapar.kernels.swiglu import swiglu

BF16, EPS = torch.bfloat16, 1e-5
SHARE = 0.85  # of the copy's rate


class Rows:
    """T rows of a model. passes: how often a matrix of the given width is read or written, at the least."""

    def __init__(self, run: Run, label: str, T: int, copy: float) -> None:
        self.run, self.label, self.T, self.copy = run, label, T, copy

    def __call__(
        self, name: str, passes: float, width: int, ours: Call, torch_s: Call | None = None,
        share: float | None = SHARE,
    ) -> None:  # fmt: skip
        others: dict[str, tuple[Call, float | None]] = {} if torch_s is None else {"torch": (torch_s, 1.0)}
        work = 2e-9 * passes * self.T * width
        beside(self.run, Timed(f"{name} {self.label}", work, "GB/s", ours, others, self.copy, share))

    def randn(self, width: int) -> Tensor:
        return self.run.randn(self.T, width, dtype=BF16)


def gradients(out: Tensor, inputs: list[Tensor], dout: Tensor) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)


def rms_norm(rows: Rows, H: int) -> None:
    x, y, dy = (rows.randn(H) for _ in range(3))
    w = rows.run.randn(H, dtype=BF16)
    leaf, weight = x.detach().requires_grad_(), w.detach().requires_grad_()
    _, h, rstd = rms.rmsnorm(x, w, EPS)
    of_input, of_weight = partial(rms.rmsnorm_input_grad, dy, h, w, rstd), partial(rms.rmsnorm_weight_grad, dy, h, rstd)
    rows("rmsnorm", 2, H, lambda: rms.rmsnorm(x, w, EPS), lambda: F.rms_norm(x, (H,), w, EPS))
    rows("add and rmsnorm", 4, H, lambda: rms.rmsnorm(x, w, EPS, y), lambda: F.rms_norm(x + y, (H,), w, EPS))
    rows("rmsnorm input gradient", 3, H, of_input)
    rows("rmsnorm weight gradient", 2, H, of_weight)
    plain = gradients(F.rms_norm(leaf, (H,), weight, EPS), [leaf, weight], dy)
    rows("rmsnorm backward", 5, H, lambda: (of_input(), of_weight()), plain, None)


def layer_norm(rows: Rows, H: int) -> None:
    x, dy = (rows.randn(H) for _ in range(2))
    w, b = (rows.run.randn(H, dtype=BF16) for _ in range(2))
    _, h, mean, rstd = ln.layernorm(x, w, b, EPS)
    rows("layernorm", 2, H, lambda: ln.layernorm(x, w, b, EPS), lambda: F.layer_norm(x, (H,), w, b, EPS))
    rows("layernorm input gradient", 3, H, lambda: ln.layernorm_input_grad(dy, h, w, mean, rstd))
    rows("layernorm weight gradient", 2, H, lambda: ln.layernorm_weight_grad(dy, h, mean, rstd))


def gated(rows: Rows, width: int) -> None:
    gate, up = (rows.randn(width).requires_grad_() for _ in range(2))
    dout, x, y = rows.randn(width), gate.detach(), up.detach()
    rows("swiglu", 3, width, lambda: swiglu(x, y), lambda: F.silu(x) * y)
    ours, theirs = (gradients(out, [gate, up], dout) for out in (swiglu(gate, up), F.silu(gate) * up))
    rows("swiglu backward", 5, width, ours, theirs)


def turned(rows: Rows, heads: int, kv_heads: int, D: int) -> None:
    q, k = (rows.run.randn(1, rows.T, n, D, dtype=BF16) for n in (heads, kv_heads))
    table = rope_table(rows.T, D, 1e4, torch.float32, torch.device(rows.run.device))
    rows("rope", 2, (heads + kv_heads) * D, lambda: rope(q, k, table))


def dropped(rows: Rows, H: int) -> None:
    """Fused with the residual sum, which torch is given as well."""
    x, residual = (rows.randn(H) for _ in range(2))
    place = torch.arange(rows.T, device=rows.run.device)
    ours = partial(dropout, x, 0.1, place, place, (1, 2, 3), residual)
    rows("dropout and sum", 3, H, ours, lambda: residual + F.dropout(x, 0.1))


def loss(rows: Rows, V: int) -> None:
    logits, targets = rows.randn(V), torch.randint(0, V, (rows.T,), device=rows.run.device)
    share = torch.full((rows.T,), 1.0 / rows.T, device=rows.run.device)
    merged = ce.merge_statistics(ce.cross_entropy_statistics(logits, targets, 0).unsqueeze(0))
    leaf, other = logits.detach().requires_grad_(), logits.clone()
    back = gradients(F.cross_entropy(leaf, targets), [leaf], torch.ones((), device=rows.run.device, dtype=BF16))
    statistics = partial(ce.cross_entropy_statistics, logits, targets, 0)
    rows("cross entropy statistics", 1, V, statistics, lambda: F.cross_entropy(logits, targets))
    # In place: the values change from call to call, and no time depends on them.
    gradient = partial(ce.cross_entropy_gradient_, other, targets, 0, merged.log_sum, share, ce.PLAIN)
    rows("cross entropy gradient", 2, V, gradient, back)
