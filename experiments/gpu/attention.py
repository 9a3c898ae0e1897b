"""One case of attention against fp64: forward, log-sum-exp and all gradients; fused, with rotary positions, forward
and the gradient of the one matrix. Its sections are lists of cases."""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.gpu import references
from experiments.gpu.compare import BOUNDS, DTYPES, SUMS, trial
from experiments.gpu.run import Run
from megapar.kernels import use_backend
from megapar.kernels.attention import attention as ours_of
from megapar.kernels.attention.fused import fused_attention_
from megapar.kernels.rope import rope, rope_table

BATCH, THETA = 2, 10000.0
PACKED = (1, 17, 300, 1000, 0, 64)
ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
NAMES = ("o", "lse", "dq", "dk", "dv", "dbias")  # the last where there is a bias


@dataclass(frozen=True)
class Case:
    """D channels, N heads, K kv heads; S and L, queries and keys: lengths, or tuples of those of packed sequences.

    E: channels of v, if not D. offset: elements by which tensors are off their alignment. fused: q, k and v beside each
    other in one matrix, q and k turned where they are; L and E are not given then.
    """

    dtype: str
    D: int
    N: int
    K: int
    S: int | tuple[int, ...]
    L: int | tuple[int, ...] | None = None
    causal: bool = True
    window: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    E: int | None = None
    offset: int = 0
    fused: bool = False
    bias: bool = False

    def __str__(self) -> str:
        width = f"D{self.D}" + (f"/{self.E}" if self.E else "")
        lengths = f"{len(self.S)} packed" if isinstance(self.S, tuple) else f"{self.S}x{self.L or self.S}"
        words = [self.dtype, width, f"{self.N}/{self.K} heads", lengths, "causal" * self.causal]
        words += [f"window {self.window}" * bool(self.window), f"cap {self.softcap}" * bool(self.softcap)]
        words += ["bias" * self.bias]
        return " ".join(filter(None, [*words, "misaligned" * bool(self.offset), "fused" * self.fused]))

    @property
    def is_plain(self) -> bool:
        """Whether torch's own attention can do it in one call."""
        odd = self.window or self.softcap or self.E or isinstance(self.S, tuple) or self.L not in (None, self.S)
        return self.causal and not odd and not self.bias and self.dtype != "fp32"


def attention_section(run: Run, cases: list[Case], rehearsed: list[Case]) -> None:
    use_backend(run.backend)
    run.poison()
    for case in cases if run.cuda else rehearsed:
        run.attempt(str(case), check_fused if case.fused else check, run, case)


def check(run: Run, case: Case) -> None:
    packed, E = isinstance(case.S, tuple), case.E or case.D
    begins = [begins_of(case.S), begins_of(case.S if case.L is None else case.L)]
    rows, keys = (x[-1] for x in begins)
    spans = [(*a, *b) for a, b in zip(*(itertools.pairwise(x) for x in begins), strict=True)]

    def make(rows: int, heads: int, channels: int) -> Tensor:
        flat = run.randn(rows * heads * channels + case.offset, dtype=DTYPES[case.dtype])
        return flat[case.offset :].view(rows, heads, channels)

    q, k, v, do = (
        make(*x) for x in ((rows, case.N, case.D), (keys, case.K, case.D), (keys, case.K, E), (rows, case.N, E))
    )
    dlse = torch.zeros(rows, case.N, device=run.device) if case.is_plain else run.randn(rows, case.N)
    cu = [torch.tensor(x, dtype=torch.int32, device=run.device) if packed else None for x in begins]

    longest = [max(b - a for a, b in itertools.pairwise(x)) for x in begins]
    bias = [run.randn(case.N, *longest, dtype=DTYPES[case.dtype])] if case.bias else []

    def shape(x: Tensor) -> Tensor:
        return x if packed else x.unflatten(0, (BATCH, -1))

    def ours() -> dict[str, Tensor]:
        given = [x.detach().requires_grad_() for x in (q, k, v, *bias)]
        o, lse = ours_of(
            *map(shape, given[:3]), causal=case.causal, window=case.window, softcap=case.softcap,
            cu_seqlens_q=cu[0], cu_seqlens_k=cu[1], return_lse=True, bias=given[3] if bias else None,
        )  # fmt: skip
        grads = torch.autograd.grad([o, lse], given, [shape(do), shape(dlse)])
        o, lse = (o, lse) if packed else (o.flatten(0, 1), lse.flatten(0, 1))
        return dict(zip(NAMES, (o, lse, *grads), strict=False))

    def plain() -> dict[str, Tensor]:
        given = [x.detach().requires_grad_() for x in (q, k, v)]
        x, y, z = (shape(x).transpose(1, 2) for x in given)
        y, z = (t.repeat_interleave(case.N // case.K, 1) for t in (y, z))
        o = torch.nn.functional.scaled_dot_product_attention(x, y, z, is_causal=True).transpose(1, 2)
        grads = torch.autograd.grad(o, given, shape(do))
        return dict(zip(("o", *NAMES[2:5]), (o.flatten(0, 1), *grads), strict=True))

    def exact() -> dict[str, Tensor]:
        return references.attention(q, k, v, do, dlse, spans, case.causal, case.window, case.softcap, *bias)

    wrong, expected = BOUNDS[case.dtype]
    gradient = (wrong, expected) if case.dtype == "fp32" else (2.5 * wrong, expected)
    bounds = {"o": (wrong, expected), "lse": (3 * SUMS[0], SUMS[1]), **dict.fromkeys(NAMES[2:], gradient)}
    trial(run, str(case), ours, exact, bounds, plain if case.is_plain else None)


def check_fused(run: Run, case: Case) -> None:
    """Where q and k are turned by `rope`, which has checks of its own, references begin. Gradients are turned back."""
    begins, packed = begins_of(case.S), isinstance(case.S, tuple)
    rows, heads = begins[-1], (case.N, case.K, case.K)
    length = rows if packed else rows // BATCH
    spans = [(*x, *x) for x in itertools.pairwise(begins)]
    flat = run.randn(rows * sum(heads) * case.D + case.offset, dtype=DTYPES[case.dtype])
    qkv, do = flat[case.offset :].view(rows, -1), run.randn(rows, case.N, case.D, dtype=DTYPES[case.dtype])
    table = rope_table(length, case.D, THETA, torch.float32, torch.device(run.device))
    starts = torch.tensor(begins, dtype=torch.int32, device=run.device) if packed else None
    options: dict[str, Any] = {"causal": case.causal, "window": case.window, "softcap": case.softcap}

    def ours() -> dict[str, Tensor]:
        given = qkv.detach().requires_grad_()
        o = fused_attention_(given * 1, case.N, case.K, length, table=table, starts=starts, **options)
        [gradient] = torch.autograd.grad(o, given, do.flatten(1))
        parts = gradient.view(rows, -1, case.D).split(heads, 1)
        return dict(zip(("o", *NAMES[2:5]), (o.detach().view(do.shape), *parts), strict=True))

    def exact() -> dict[str, Tensor]:
        q, k, v = qkv.view(-1, length, sum(heads), case.D).split(heads, 2)
        q, k, v = (x.flatten(0, 1) for x in (*rope(q, k, table), v))
        found = references.attention(q, k, v, do, torch.zeros(rows, case.N, device=run.device), spans, **options)
        cosine, sine = table.double().repeat(rows // length, 1)[:, None].chunk(2, -1)
        for name in ("dq", "dk"):
            a, b = found[name].chunk(2, -1)
            found[name] = torch.cat([a * cosine + b * sine, b * cosine - a * sine], -1)
        return found

    wrong, expected = BOUNDS[case.dtype]
    gradient = (wrong, expected) if case.dtype == "fp32" else (2.5 * wrong, expected)
    trial(run, str(case), ours, exact, {"o": (wrong, expected), **dict.fromkeys(NAMES[2:5], gradient)})


def begins_of(lengths: int | tuple[int, ...]) -> list[int]:
    """Where each sequence begins, and where the last one ends."""
    every = lengths if isinstance(lengths, tuple) else (lengths,) * BATCH
    return [0, *itertools.accumulate(every)]
