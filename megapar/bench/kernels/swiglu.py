"""The activations of a model's MLP."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megapar.bench.problem import Plan, Problem, Runner, differentiable, normal
from megapar.kernels import swiglu as activations
from megapar.kernels.shapes import DTYPES, Sizes


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


def gelu_erf(sizes: Sizes, tokens: int, dtype: str, device: str) -> Problem:
    x, dout = (normal(tokens, sizes.ffn, dtype=DTYPES[dtype], device=device) for _ in range(2))
    return _activation("gelu_erf", activations.gelu_erf, F.gelu, (x,), dout, None)


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


BENCH = {"swiglu": swiglu, "geglu": geglu, "gelu": gelu, "gelu_erf": gelu_erf}
