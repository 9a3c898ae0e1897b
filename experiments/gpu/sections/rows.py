"""What goes over rows: norms, rotary positions, activations, cross entropy, dropout."""

import importlib
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.gpu import references
from experiments.gpu.compare import BOUNDS, DTYPES, SUMS, distance, trial
from experiments.gpu.run import Run
from experiments.gpu.section import Section
from megapar.kernels import cross_entropy as ce
from megapar.kernels import dropout as drop
from megapar.kernels import swiglu as gates
from megapar.kernels import use_backend
from megapar.kernels.rope import rope as turn
from megapar.kernels.rope import rope_table

EPS, THETA = 1e-5, 10000.0


def rows(run: Run) -> None:
    use_backend(run.backend)
    run.poison()
    for kind in ("rmsnorm", "layernorm"):
        for dtype in ("bf16", "fp32"):
            for T, H in ((1000, 4096), (4097, 128), (130, 16384), (777, 768)) if run.cuda else ((130, 40),):
                run.attempt(f"{kind} {dtype} {T}x{H}", norm, run, kind, dtype, T, H, dtype == "fp32" or H == 768)
        run.attempt(f"{kind} misaligned", norm, run, kind, "bf16", *((1000, 768) if run.cuda else (5, 32)), False, 1)
    for dtype in ("bf16", "fp32"):
        for interleaved in (False, True):
            size = (2, 777, 8, 2, 128) if run.cuda else (2, 5, 2, 1, 8)
            run.attempt("rope", rope, run, dtype, size, interleaved, dtype == "fp32" or interleaved)
        for name in ("swiglu", "geglu", "gelu", "gelu_erf"):
            run.attempt(name, activation, run, name, dtype, *((777, 5632) if run.cuda else (9, 40)))
        for name in ("swiglu", "geglu"):
            run.attempt(name, activation, run, name, dtype, *((777, 5632) if run.cuda else (9, 40)), fused=True)
    T = 500 if run.cuda else 9
    for V in (1024, 50257, 128256) if run.cuda else (61,):
        run.attempt("cross entropy", cross_entropy, run, "bf16", T, V)
        run.attempt("cross entropy", cross_entropy, run, "fp32", T, V, 0.1, 1e-4)
    V = 50257 if run.cuda else 61
    run.attempt("cross entropy", cross_entropy, run, "bf16", T, V, hidden=True)
    run.attempt("cross entropy", cross_entropy, run, "bf16", T, V - 1, offset=1)
    run.attempt("dropout", dropped, run)


def norm(run: Run, kind: str, dtype: str, T: int, H: int, residual: bool, offset: int = 0) -> None:
    """Values, and gradients of the input and of the weights; with a residual its sum and gradient too."""
    module, layer = importlib.import_module(f"megapar.kernels.{kind}"), kind == "layernorm"
    x = run.randn(T * H + offset, dtype=DTYPES[dtype])[offset:].view(T, H)
    weight, bias, dy, dh, other = (run.randn(*s, dtype=DTYPES[dtype]) for s in ((H,), (H,), (T, H), (T, H), (T, H)))
    weights = (weight, bias)[: 1 + layer]

    def ours() -> dict[str, Tensor]:
        y, h, *statistics = getattr(module, kind)(x, *weights, EPS, other if residual else None)
        dx = getattr(module, f"{kind}_input_grad")(dy, h, weight, *statistics, dh if residual else None)
        dw = getattr(module, f"{kind}_weight_grad")(dy, h, *statistics)
        return {"y": y, "h": h, "dx": dx} | dict(zip(("dw", "db"), dw if layer else (dw,), strict=False))

    def exact() -> dict[str, Tensor]:
        h = (x + other if residual else x).double().requires_grad_()  # rounded before it is normalised
        given = [t.double().requires_grad_() for t in weights]
        centred = h - h.mean(1, keepdim=True) if layer else h
        y = centred * torch.rsqrt(centred.square().mean(1, keepdim=True) + EPS) * given[0]
        y = y + given[1] if layer else y
        dx, *dw = torch.autograd.grad(y, [h, *given], dy.double())
        found = {"y": y.detach(), "h": h.detach(), "dx": dx + dh.double() if residual else dx}
        return found | dict(zip(("dw", "db"), dw, strict=False))

    bounds = dict.fromkeys(("y", "h", "dx"), BOUNDS[dtype]) | dict.fromkeys(("dw", "db"), SUMS)
    name = f"{kind} {dtype} {T}x{H}" + " residual" * residual + " misaligned" * bool(offset)
    trial(run, name, ours, exact, bounds)


def rope(run: Run, dtype: str, size: tuple[int, ...], interleaved: bool, with_offsets: bool) -> None:
    B, S, N, K, D = size
    table = rope_table(2 * S, D, THETA, torch.float32, torch.device(run.device))
    q, dq, k, dk = (run.randn(B, S, heads, D, dtype=DTYPES[dtype]) for heads in (N, N, K, K))
    offsets = torch.randint(0, S, (B,), device=run.device) if with_offsets else None

    def ours() -> dict[str, Tensor]:
        given = [x.detach().requires_grad_() for x in (q, k)]
        outs = turn(given[0], given[1], table, offsets=offsets, interleaved=interleaved)
        grads = torch.autograd.grad(outs, given, [dq, dk])
        return dict(zip(("q", "k", "dq", "dk"), (*outs, *grads), strict=True))

    def turned(x: Tensor, back: bool) -> Tensor:
        begin = torch.zeros(B, 1, device=run.device) if offsets is None else offsets[:, None]
        place = (begin + torch.arange(S, device=run.device)).double()
        angle = place[..., None] * THETA ** (-torch.arange(0, D, 2, device=run.device).double() / D)
        c, s = angle.cos()[:, :, None], angle.sin()[:, :, None] * (-1 if back else 1)
        wide = x.double()
        a, b = (wide[..., ::2], wide[..., 1::2]) if interleaved else wide.chunk(2, -1)
        pair = [a * c - b * s, b * c + a * s]
        return torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)

    def exact() -> dict[str, Tensor]:
        return {"q": turned(q, False), "k": turned(k, False), "dq": turned(dq, True), "dk": turned(dk, True)}

    words = f"rope {dtype} {B}x{S}x{N}/{K}x{D}" + " interleaved" * interleaved + " offsets" * with_offsets
    trial(run, words, ours, exact, BOUNDS[dtype])


ALONE = ("gelu", "gelu_erf")  # without a gate
GELU = {"gelu_erf": "none"}  # of its form: torch's word


def activation(run: Run, name: str, dtype: str, T: int, width: int, fused: bool = False) -> None:
    """Of column slices of a wider matrix; fused: of gate beside up in one, as an MLP has them, with one gradient."""
    both, dout = run.randn(T, 2 * width + 8, dtype=DTYPES[dtype]), run.randn(T, width, dtype=DTYPES[dtype])
    parts = [both[:, :width], both[:, width + 8 :]][: 1 if name in ALONE else 2]

    def ours() -> dict[str, Tensor]:
        given = [x.detach().requires_grad_() for x in ([torch.cat(parts, 1)] if fused else parts)]
        out = getattr(gates, name)(*given)
        grads = torch.autograd.grad(out, given, dout)
        return {"out": out} | dict(zip(("dgate", "dup"), grads[0].chunk(2, 1) if fused else grads, strict=False))

    def exact() -> dict[str, Tensor]:
        given = [x.double().requires_grad_() for x in parts]
        out = F.silu(given[0]) if name == "swiglu" else F.gelu(given[0], approximate=GELU.get(name, "tanh"))
        out = out if name in ALONE else out * given[1]
        grads = torch.autograd.grad(out, given, dout.double())
        return {"out": out.detach()} | dict(zip(("dgate", "dup"), grads, strict=False))

    trial(run, f"{name} {dtype} {T}x{width} {'fused' if fused else 'of slices'}", ours, exact, BOUNDS[dtype])


def cross_entropy(
    run: Run, dtype: str, T: int, V: int, smoothing: float = 0.0, z: float = 0.0, hidden: bool = False, offset: int = 0
) -> None:
    """Statistics of a first pass, losses from them, and the gradient in the logits' place."""
    logits = run.randn(T * V + offset, dtype=DTYPES[dtype], scale=3.0)[offset:].view(T, V)
    targets, share = torch.randint(0, V, (T,), device=run.device), torch.rand(T, device=run.device)
    if hidden:
        logits = logits.masked_fill(torch.rand(T, V, device=run.device) < 0.3, -math.inf)
        logits[torch.arange(T, device=run.device), targets] = 0.5
    share[::7] = 0.0

    def ours() -> dict[str, Tensor]:
        columns = ce.cross_entropy_statistics(logits, targets, 0, smoothing > 0)
        merged = ce.merge_statistics(columns.unsqueeze(0))
        objective, given = ce.Objective(smoothing, z, V), logits.clone()
        gradient = ce.cross_entropy_gradient_(given, targets, 0, merged.log_sum, share, objective)
        named = dict(zip(("largest", "sums", "target", "total"), columns.unbind(1), strict=False))
        return {"loss": merged.losses(objective), "grad": gradient} | named

    def exact() -> dict[str, Tensor]:
        losses, gradient = references.cross_entropy(logits, targets, share, smoothing, z)
        return {"loss": losses, "grad": gradient} | references.statistics(logits, targets)

    bounds = dict.fromkeys(("loss", "largest", "sums", "target", "total"), SUMS) | {"grad": BOUNDS[dtype]}
    words = f"cross entropy {dtype} {T}x{V}" + " hidden" * hidden + f" smoothing {smoothing} z {z}" * bool(z)
    trial(run, words + " misaligned" * bool(offset), ours, exact, bounds)


def dropped(run: Run) -> None:
    """The mask is a function of coordinates: the same on every device."""
    samples, positions = torch.arange(64).repeat_interleave(16), torch.arange(16).repeat(64)
    rate, site = 0.1, (1, 2, 3)
    mask = drop.keep_mask(1 - rate, drop.token_keys(samples, positions, *site), 96)
    run.within("dropout's share of zeros", abs(float(mask.double().mean()) / (1 - rate) - 1), 0.01)
    place, kept = (samples.to(run.device), positions.to(run.device)), mask.to(run.device) / (1 - rate)
    ones = torch.ones(len(mask), 96, device=run.device)
    run.row("dropout's mask is the CPU's", torch.equal(drop.dropout(ones, rate, *place, site).cpu() > 0, mask))
    for dtype in ("fp32", "bf16"):
        x, residual, dy = (run.randn(len(mask), 96, dtype=DTYPES[dtype]) for _ in range(3))
        x.requires_grad_()
        residual.requires_grad_()
        y = drop.dropout(x, rate, *place, site, residual)
        dx, dresidual = torch.autograd.grad(y, (x, residual), dy)
        exact = residual.double() + x.double() * kept
        run.within(f"dropout {dtype}", distance(y.detach(), exact.detach()), *BOUNDS[dtype])
        run.within(f"dropout {dtype}, gradient", distance(dx, dy.double() * kept), *BOUNDS[dtype])
        run.row(f"dropout {dtype}, gradient of the residual stream", torch.equal(dresidual, dy))


SECTION = Section("rows", wave=2, seconds=100, run=rows, environment={"CUBLAS_WORKSPACE_CONFIG": ":4096:8"})
