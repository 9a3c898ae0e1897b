"""RoPE of a model's queries and keys, and the activations of its MLP."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megapar.bench.problem import DTYPES, Plan, Problem, Runner, Sizes, differentiable, normal
from megapar.kernels import rope as rope_kernel
from megapar.kernels import swiglu as activations

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


def swiglu(sizes: Sizes, tokens: int, dtype: str, device: str) -> Problem:
    gate, up, dout = (normal(tokens, sizes.ffn, dtype=DTYPES[dtype], device=device) for _ in range(3))

    def liger() -> Runner:
        from liger_kernel.transformers.functional import liger_swiglu

        return differentiable(liger_swiglu, (gate, up), [dout])

    return _activation("silu", activations.swiglu, lambda gate, up: F.silu(gate) * up, (gate, up), dout, liger)


def geglu(sizes: Sizes, tokens: int, dtype: str, device: str) -> Problem:
    gate, up, dout = (normal(tokens, sizes.ffn, dtype=DTYPES[dtype], device=device) for _ in range(3))

    def liger() -> Runner:
        from liger_kernel.transformers.functional import liger_geglu

        return differentiable(liger_geglu, (gate, up), [dout])

    plain = lambda gate, up: F.gelu(gate, approximate="tanh") * up  # noqa: E731
    return _activation("gelu", activations.geglu, plain, (gate, up), dout, liger)


def gelu(sizes: Sizes, tokens: int, dtype: str, device: str) -> Problem:
    x, dout = (normal(tokens, sizes.ffn, dtype=DTYPES[dtype], device=device) for _ in range(2))
    return _activation("gelu", activations.gelu, lambda x: F.gelu(x, approximate="tanh"), (x,), dout, None)


def _activation(
    function: str,
    ours: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    dout: Tensor,
    liger: Callable[[], Runner] | None,
) -> Problem:
    def plans(arch: str) -> dict[str, Plan]:
        gate, up = inputs[0], inputs[1] if len(inputs) > 1 else None
        out, dgate = torch.empty_like(dout), torch.empty_like(dout)
        dup = None if up is None else torch.empty_like(dout)
        given = {"dout": dout, "dgate": dgate, "dup": dup}
        return {
            "forward": Plan([activations.launch(activations.activation_forward_kernel, function, gate, up, out=out)]),
            "backward": Plan([activations.launch(activations.activation_backward_kernel, function, gate, up, **given)]),
        }

    providers = {
        "megapar": lambda: differentiable(ours, inputs, [dout]),
        "torch": lambda: differentiable(plain, inputs, [dout]),
    }
    return Problem(providers if liger is None else providers | {"liger_kernel": liger}, plans)
