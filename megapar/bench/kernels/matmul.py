"""The up projection of a model's MLP. Its backward has both gradients; the weight's is added to one in fp32.

`torch` rounds a 16-bit weight gradient before it is added, `torch_fp32` makes it in fp32: ours does neither, and has no
pass of its own for the sum.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megapar.bench.problem import Plan, Problem, Runner, normal
from megapar.kernels import matmul as matmul_kernel
from megapar.kernels._common import Launch
from megapar.kernels._counters import counter_of
from megapar.kernels.shapes import DTYPES, Sizes


def matmul(sizes: Sizes, tokens: int, dtype: str, device: str) -> Problem:
    kind = DTYPES[dtype]
    x, dy = (normal(tokens, width, dtype=kind, device=device) for width in (sizes.hidden, sizes.ffn))
    w = normal(sizes.ffn, sizes.hidden, dtype=kind, device=device) * sizes.hidden**-0.5
    main_grad = torch.zeros(sizes.ffn, sizes.hidden, device=device)

    def runner(
        multiply: Callable[[Tensor, Tensor], Tensor], add_weight_grad: Callable[[], object], note: str = ""
    ) -> Runner:
        def backward(kept: tuple[Tensor]) -> tuple[Tensor, Tensor]:
            add_weight_grad()
            return multiply(dy, w), main_grad

        return Runner(lambda: (multiply(x, w.t()),), backward, note)

    def ours() -> Runner:
        return runner(matmul_kernel.matmul, lambda: matmul_kernel.add_matmul(main_grad, dy.t(), x))

    def plain() -> Runner:
        return runner(torch.mm, lambda: main_grad.add_(torch.mm(dy.t(), x)), "main_grad.add_(mm)")

    def plain_fp32() -> Runner:
        made = lambda: torch.mm(dy.t(), x, out_dtype=torch.float32)  # noqa: E731
        return runner(torch.mm, lambda: main_grad.add_(made()), "main_grad.add_(mm(out_dtype=fp32))")

    def plans(arch: str) -> dict[str, Plan]:
        def launch(a: Tensor, b: Tensor, out: Tensor, residual: Tensor | None = None) -> Launch:
            return matmul_kernel.launch(arch, a, b, out, residual=residual, counter=counter_of(out))

        backward = [launch(dy, w, torch.empty_like(x)), launch(dy.t(), x, main_grad, main_grad)]
        return {
            "forward": Plan([launch(x, w.t(), torch.empty_like(dy))], tensor_cores=True),
            "backward": Plan(backward, tensor_cores=True),
        }

    providers = {"megapar": ours, "torch": plain} | ({} if dtype == "fp32" else {"torch_fp32": plain_fp32})
    return Problem(providers, plans)


BENCH = {"matmul": matmul}
