"""Every kernel beside torch's named backends and beside the ceilings, at the shapes of an 8B and a 1.1B model."""

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from experiments.gpu import timed_rows
from experiments.gpu.run import Run, first_line
from experiments.gpu.section import Section
from experiments.gpu.sections.ceilings import COPY, FP32, PRODUCT
from experiments.gpu.timing import Call, Timed, beside
from megapar.kernels import use_backend
from megapar.kernels._common import aligned_matrix
from megapar.kernels.attention import attention
from megapar.kernels.matmul import add_matmul, matmul

BF16 = torch.bfloat16
BACKENDS = {"FLASH": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
OF_CUBLAS, OF_CUBLAS_DW = 0.90, 0.75
Least = dict[str, float]  # of our rate to a backend's
# Hidden size, heads, kv heads, channels of a head, inner width of the MLP.
MODELS = {"8B": (4096, 32, 8, 128, 14336), "1.1B": (2048, 16, 8, 128, 5632)}
TINY = {"tiny": (32, 2, 1, 16, 64)}
# Samples, length, heads, kv heads, channels; the floors of forward and backward.
ATTENTION: dict[str, tuple[tuple[int, ...], Least, Least]] = {
    "D128 8B 1x8192": ((1, 8192, 32, 8, 128), {"FLASH": 1.15, "cuDNN": 0.85}, {"FLASH": 1.2, "cuDNN": 0.7}),
    "D128 1.1B 2x4096": ((2, 4096, 16, 8, 128), {}, {}),
    "D64 1x8192": ((1, 8192, 16, 16, 64), {"FLASH": 1.0}, {}),
    "D128 8B 1x4096": ((1, 4096, 32, 8, 128), {}, {}),
}
TINY_ATTENTION: dict[str, tuple[tuple[int, ...], Least, Least]] = {"tiny": ((1, 16, 2, 1, 16), {}, {})}
# Rows, inner length, columns, beside those of the models.
HEADS = {
    "1.1B's head 8192": (8192, 2048, 32768),
    "GPT-2's head 8192": (8192, 768, 50257),
    "8B 4096": (4096, 4096, 14336),
}
TINY_HEADS = {"tiny head": (16, 32, 61)}


def times(run: Run) -> None:
    use_backend(run.backend)
    T, V = (8192, 32768) if run.cuda else (16, 64)
    for label, (sizes, forward, backward) in (ATTENTION if run.cuda else TINY_ATTENTION).items():
        run.attempt(f"attention {label}", attended, run, label, sizes, forward, backward)
    for name, (hidden, heads, kv_heads, D, width) in (MODELS if run.cuda else TINY).items():
        run.attempt(f"products {name}", products, run, f"{name} {T}", T, hidden, width)
        rows = timed_rows.Rows(run, f"{name} {T}", T, run.ceiling(COPY))
        run.attempt(f"rmsnorm {name}", timed_rows.rms_norm, rows, hidden)
        run.attempt(f"layernorm {name}", timed_rows.layer_norm, rows, hidden)
        run.attempt(f"swiglu {name}", timed_rows.gated, rows, width)
        run.attempt(f"rope {name}", timed_rows.turned, rows, heads, kv_heads, D)
        run.attempt(f"dropout {name}", timed_rows.dropped, rows, hidden)
        run.attempt(f"cross entropy {name}", timed_rows.loss, rows, V)
        if run.cuda:
            torch.cuda.empty_cache()  # card-only
    for label, size in (HEADS if run.cuda else TINY_HEADS).items():
        run.attempt(f"products {label}", products, run, label, *size)
    run.attempt("product fp32", fp32, run)


def attended(run: Run, label: str, sizes: tuple[int, ...], forward: Least, backward: Least) -> None:
    """Causal; torch's backends by name, with their kv heads repeated for every query head, as FLASH wants them."""
    B, S, N, K, D = sizes
    q, do = (run.randn(B, S, N, D, dtype=BF16) for _ in range(2))
    k, v = (run.randn(B, S, K, D, dtype=BF16) for _ in range(2))
    mine = [x.detach().requires_grad_() for x in (q, k, v)]
    o = attention(*mine)
    heads = [x.detach().transpose(1, 2).contiguous() for x in (q, k, v)]
    theirs = [x.repeat_interleave(N // x.shape[1], 1).requires_grad_() for x in heads]
    grad = do.transpose(1, 2).contiguous()
    ahead, back = dict[str, tuple[Call, float | None]](), dict[str, tuple[Call, float | None]]()
    for name, backend in BACKENDS.items():

        def forward_of(backend: SDPBackend = backend) -> torch.Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(theirs[0], theirs[1], theirs[2], is_causal=True)

        try:
            out = forward_of()
        except RuntimeError as error:
            run.skip(f"attention {label} beside {name}", f"torch can't run it here: {first_line(error)}")
            continue
        ahead[name] = forward_of, forward.get(name)
        back[name] = timed_rows.gradients(out, theirs, grad), backward.get(name)
    work, ceiling = 2e-9 * B * N * S * S * D, run.ceiling(PRODUCT)
    ours = [x.detach() for x in mine]
    beside(run, Timed(f"attention forward {label}", work, "TFLOP/s", lambda: attention(*ours), ahead, ceiling))
    call = timed_rows.gradients(o, mine, do)
    beside(run, Timed(f"attention backward {label}", 2.5 * work, "TFLOP/s", call, back, ceiling))


def products(run: Run, label: str, T: int, hidden: int, width: int) -> None:
    """Forward, input gradient, and weight gradient added in fp32. Their floors are shares of cuBLAS's own rate."""
    x, dy = run.randn(T, hidden, dtype=BF16), run.randn(T, width, dtype=BF16)
    ours = aligned_matrix(dy, T, width).copy_(dy)  # as a gradient of logits comes
    w, total = run.randn(width, hidden, dtype=BF16, scale=hidden**-0.5), run.randn(width, hidden)
    work, ceiling = 2e-9 * T * hidden * width, run.ceiling(PRODUCT)

    def timed(check: str, ours: Call, share: float, others: dict[str, tuple[Call, float | None]]) -> None:
        timed = Timed(f"{check} {label}", work, "TFLOP/s", ours, others, ceiling, share, "cuBLAS")
        beside(run, timed)

    timed("product", lambda: matmul(x, w.t(), aligned=True), OF_CUBLAS, {"cuBLAS": (lambda: x @ w.t(), OF_CUBLAS)})
    timed("product dX", lambda: matmul(ours, w), OF_CUBLAS, {"cuBLAS": (lambda: dy @ w, OF_CUBLAS)})
    others: dict[str, tuple[Call, float | None]] = {
        "cuBLAS": (lambda: dy.t() @ x, OF_CUBLAS_DW),  # without the sum, which no other backend has in one pass
        "cuBLAS bf16 + add": (lambda: total.add_(dy.t() @ x), None),
        "cuBLAS fp32 out + add": (lambda: total.add_(torch.mm(dy.t(), x, out_dtype=torch.float32)), None),
    }
    timed("product dW into fp32", lambda: add_matmul(total, ours.t(), x), OF_CUBLAS_DW, others)


def fp32(run: Run) -> None:
    """Three tf32 products for one, beside cuBLAS without tf32."""
    n = 4096 if run.cuda else 32
    a, b = (run.randn(n, n) for _ in range(2))
    others: dict[str, tuple[Call, float | None]] = {"cuBLAS": (lambda: a @ b, 1.0)}
    work = 2e-9 * n**3
    beside(run, Timed("product fp32", work, "TFLOP/s", lambda: matmul(a, b), others, run.ceiling(FP32)))


SECTION = Section("times", wave=3, seconds=80, run=times, needs=("ceilings",))
