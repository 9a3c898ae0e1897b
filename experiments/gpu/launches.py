"""One small launch of each kernel, for the memory checker. Judges nothing."""

import torch

from megapar.kernels import cross_entropy as ce
from megapar.kernels import layernorm as ln
from megapar.kernels import rmsnorm as rms
from megapar.kernels import use_backend
from megapar.kernels.attention import attention
from megapar.kernels.attention.fused import fused_attention_
from megapar.kernels.dropout import dropout
from megapar.kernels.matmul import add_matmul, matmul
from megapar.kernels.rope import rope, rope_table
from megapar.kernels.swiglu import gelu, swiglu

DONE = "launches done"


def launches(device: str) -> None:
    use_backend("triton" if device == "cuda" else "interpret")
    torch.set_default_device(device)
    T, D = (200, 64) if device == "cuda" else (9, 16)
    cu = torch.tensor([0, 3, T], dtype=torch.int32)
    for dtype in (torch.bfloat16, torch.float32):
        x, y, w = (torch.randn(T, 2 * D, dtype=dtype) for _ in range(3))
        matmul(x, y.t())
        add_matmul(torch.zeros(2 * D, 2 * D), x.t(), y)
        _, h, rstd = rms.rmsnorm(x, w[0], 1e-5, y)
        rms.rmsnorm_input_grad(y, h, w[0], rstd)
        rms.rmsnorm_weight_grad(y, h, rstd)
        _, h, mean, rstd = ln.layernorm(x, w[0], w[1], 1e-5, y)
        ln.layernorm_input_grad(y, h, w[0], mean, rstd)
        ln.layernorm_weight_grad(y, h, mean, rstd)
        gate, up = x.detach().requires_grad_(), y.detach().requires_grad_()
        torch.autograd.grad((swiglu(gate, up) + gelu(gate)).sum(), [gate, up])
        targets = torch.randint(0, 2 * D, (T,))
        merged = ce.merge_statistics(ce.cross_entropy_statistics(x, targets, 0, True).unsqueeze(0))
        ce.cross_entropy_gradient_(x.clone(), targets, 0, merged.log_sum, rstd, ce.Objective(0.1, 1e-4, 2 * D))
        place, z = torch.arange(T), x.detach().requires_grad_()
        torch.autograd.grad(dropout(z, 0.1, place, place, (1, 2, 3), y).sum(), [z])
        q, k, v = (torch.randn(1, T, n, D, dtype=dtype).requires_grad_() for n in (2, 1, 1))
        table = rope_table(T, D, 1e4, torch.float32, torch.device(device))
        turned = rope(q, k, table)
        torch.autograd.grad(attention(*turned, v).sum(), [q, k, v])
        qkv = torch.cat([q, k, v], 2).view(T, 4 * D)
        torch.autograd.grad(fused_attention_(qkv * 1, 2, 1, T, table=table).sum(), [q, k, v])
        torch.autograd.grad(attention(q[0], k[0], v[0], cu_seqlens_q=cu, cu_seqlens_k=cu).sum(), [q, k, v])
    if device == "cuda":
        torch.cuda.synchronize()  # card-only
    print(DONE, flush=True)
