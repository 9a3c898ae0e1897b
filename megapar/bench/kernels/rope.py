"""RoPE of a model's queries and keys."""

import torch
from torch import Tensor

from megapar.bench.problem import Plan, Problem, Runner, differentiable, normal
from megapar.kernels import rope as rope_kernel
from megapar.kernels.shapes import DTYPES, Sizes

THETA = 10000.0


def rope(sizes: Sizes, tokens: int, dtype: str, device: str) -> Problem:
    kind, channels = DTYPES[dtype], sizes.head_dim
    q, dq = (normal(1, tokens, sizes.heads, channels, dtype=kind, device=device) for _ in range(2))
    k, dk = (normal(1, tokens, sizes.kv_heads, channels, dtype=kind, device=device) for _ in range(2))
    table = rope_kernel.rope_table(tokens, channels, THETA, torch.float32, torch.device(device))
    cosine, sine = (half.repeat(1, 2).to(kind) for half in table.chunk(2, 1))  # as models in plain torch keep them

    def torch_rope(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        def turn(x: Tensor) -> Tensor:
            first, second = x.chunk(2, -1)
            return x * cosine[:, None] + torch.cat([-second, first], -1) * sine[:, None]

        return turn(q), turn(k)

    def liger() -> Runner:
        from liger_kernel.transformers.functional import liger_rope

        def turn(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
            turned = liger_rope(q.transpose(1, 2), k.transpose(1, 2), cosine[None], sine[None])
            return turned[0].transpose(1, 2), turned[1].transpose(1, 2)

        return differentiable(turn, (q, k), [dq, dk])

    def plans(arch: str) -> dict[str, Plan]:
        def plan(q: Tensor, k: Tensor, inverse: bool) -> Plan:
            outs = torch.empty_like(q), torch.empty_like(k)
            launch = rope_kernel.launch(q, k, *outs, table, None, False, inverse)
            return Plan([launch])

        return {"forward": plan(q, k, False), "backward": plan(dq, dk, True)}

    providers = {
        "megapar": lambda: differentiable(lambda q, k: rope_kernel.rope(q, k, table), (q, k), [dq, dk]),
        "torch": lambda: differentiable(torch_rope, (q, k), [dq, dk]),
        "liger_kernel": liger,
    }
    return Problem(providers, plans)


BENCH = {"rope": rope}
