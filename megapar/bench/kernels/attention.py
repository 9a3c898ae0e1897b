"""Causal attention over one sample, with the heads of a model.

torch has several forms of it, which differ by a factor: `torch` is the one that it picks, named in the row, and
`torch_flash` and `torch_cudnn` are asked for by name. Those two get keys and values with a head for each query head,
made before the clock runs, as not each takes grouped heads; so they are spared the sum over a group.

FLOPs are counted as the field does (FlashAttention's benchmarks): two products forward, and of the backward five,
although ours computes two of them twice. Only what the causal mask shows counts.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megapar.bench.problem import Plan, Problem, Runner, differentiable, normal
from megapar.kernels._common import matrix
from megapar.kernels.attention import attention as ours
from megapar.kernels.attention.launch import UNLIMITED, Call
from megapar.kernels.shapes import DTYPES, Sizes


def attention(sizes: Sizes, tokens: int, dtype: str, device: str) -> Problem:
    kind, channels = DTYPES[dtype], sizes.head_dim
    q, do = (normal(1, tokens, sizes.heads, channels, dtype=kind, device=device) for _ in range(2))
    k, v = (normal(1, tokens, sizes.kv_heads, channels, dtype=kind, device=device) for _ in range(2))

    grouped = sizes.heads != sizes.kv_heads

    def torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)

    def picked_by_torch() -> Runner:
        pick: Any = torch._fused_sdp_choice  # which backend scaled_dot_product_attention takes, as a number
        picked = pick(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=grouped)
        return differentiable(torch_attention, (q, k, v), [do], SDPBackend(picked).name)

    def named(backend: SDPBackend) -> Runner:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        heads_first = [x.transpose(1, 2).contiguous() for x in (q, *(_for_every_head(x, sizes) for x in (k, v)))]
        return differentiable(attend, heads_first, [do.transpose(1, 2).contiguous()], backend.name)

    def flash_attention() -> Runner:
        from flash_attn import flash_attn_func

        return differentiable(lambda q, k, v: flash_attn_func(q, k, v, causal=True), (q, k, v), [do])

    def plans(arch: str) -> dict[str, Plan]:
        call = Call.of(q, k, v, None, None, channels**-0.5, UNLIMITED, 0, None)
        o, lse, dlse = torch.empty_like(q), *torch.empty(2, sizes.heads, tokens, device=device)
        statistics = torch.empty(2, sizes.heads, tokens, device=device)
        dq, dk, dv, dout = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), matrix(do)
        out = matrix(o)
        forward = call.forward(arch, out, lse)
        flops = forward.metadata()[f"flops{8 * kind.itemsize}"]
        backward = [
            call.statistics(arch, out, dout, lse, dlse, statistics),
            call.dkdv(arch, dout, statistics, matrix(dk), matrix(dv)),
            call.dq(arch, dout, statistics, matrix(dq)),
        ]
        return {
            "forward": Plan([forward], tensor_cores=True),
            # dlse: zeros here, as nothing depends on the log-sum-exp
            "backward": Plan(backward, scratch=[statistics, dlse], tensor_cores=True, flops=2.5 * flops),
        }

    providers: dict[str, Callable[[], Runner]] = {
        "megapar": lambda: differentiable(ours, (q, k, v), [do]),
        "torch": picked_by_torch,
    }
    if dtype != "fp32":
        providers["torch_flash"] = partial(named, SDPBackend.FLASH_ATTENTION)
        providers["torch_cudnn"] = partial(named, SDPBackend.CUDNN_ATTENTION)
        providers["flash_attn"] = flash_attention
    return Problem(providers, plans)


def _for_every_head(x: Tensor, sizes: Sizes) -> Tensor:
    """k or v [B, S, K, D] with a head for each query head, [B, S, N, D]."""
    return repeat(x, "b s k d -> b s (k group) d", group=sizes.heads // sizes.kv_heads)


BENCH = {"attention": attention}
