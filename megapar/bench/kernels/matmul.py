"""The up projection of a model's MLP. Its backward has both gradients; the weight's is added to one in fp32."""

import torch
from torch import Tensor

from megapar.bench.problem import Plan, Problem, Runner, differentiable, normal
from megapar.kernels import matmul as matmul_kernel
from megapar.kernels.shapes import DTYPES, Sizes


def matmul(sizes: Sizes, tokens: int, dtype: str, device: str) -> Problem:
    kind = DTYPES[dtype]
    x, dy = (normal(tokens, width, dtype=kind, device=device) for width in (sizes.hidden, sizes.ffn))
    w = normal(sizes.ffn, sizes.hidden, dtype=kind, device=device) * sizes.hidden**-0.5
    main_grad = torch.zeros(sizes.ffn, sizes.hidden, device=device)

    def ours() -> Runner:
        def backward(kept: tuple[Tensor]) -> tuple[Tensor, Tensor]:
            matmul_kernel.add_matmul(main_grad, dy.t(), x)
            return matmul_kernel.matmul(dy, w), main_grad

        return Runner(lambda: (matmul_kernel.matmul(x, w.t()),), backward)

    def plans(arch: str) -> dict[str, Plan]:
        y, dx = torch.empty_like(dy), torch.empty_like(x)
        backward = [
            matmul_kernel.launch(arch, dy, w, dx),
            matmul_kernel.launch(arch, dy.t(), x, main_grad, residual=main_grad),
        ]
        return {
            "forward": Plan([matmul_kernel.launch(arch, x, w.t(), y)], tensor_cores=True),
            "backward": Plan(backward, tensor_cores=True),
        }

    # torch's gradient of the weight is a tensor of its own, in the weight's dtype
    providers = {"megapar": ours, "torch": lambda: differentiable(lambda x, w: x @ w.t(), (x, w), [dy])}
    return Problem(providers, plans)


BENCH = {"matmul": matmul}
