"""A plain torch decoder, eager: cuBLAS, F.rms_norm, SDPA's FLASH, F.cross_entropy. Weights and moments in bf16."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from experiments.gpu.run import Run

EPS, THETA = 1e-5, 1e4


class Layer(nn.Module):
    def __init__(self, one: SimpleNamespace) -> None:
        super().__init__()
        self.parts, self.D = [one.heads, one.kv_heads, one.kv_heads], one.head_dim
        self.norm1, self.norm2 = (nn.Parameter(torch.ones(one.hidden)) for _ in range(2))
        self.qkv = nn.Linear(one.hidden, sum(self.parts) * self.D, bias=False)
        self.out = nn.Linear(one.heads * self.D, one.hidden, bias=False)
        self.up = nn.Linear(one.hidden, 2 * one.ffn, bias=False)
        self.down = nn.Linear(one.ffn, one.hidden, bias=False)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        B, S, H = x.shape
        qkv = self.qkv(F.rms_norm(x, (H,), self.norm1, EPS)).view(B, S, -1, self.D).transpose(1, 2)
        q, k, v = qkv.split(self.parts, 1)

        def turn(t: Tensor) -> Tensor:
            a, b = t.chunk(2, -1)
            return t * cosine + torch.cat([-b, a], -1) * sine

        grouped = self.parts[0] != self.parts[1]
        y = F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True, enable_gqa=grouped)
        x = x + self.out(y.transpose(1, 2).reshape(B, S, -1))
        gate, up = self.up(F.rms_norm(x, (H,), self.norm2, EPS)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Decoder(nn.Module):
    """sizes as `models.sizes_of` has them."""

    def __init__(self, one: SimpleNamespace) -> None:
        super().__init__()
        self.embedding = nn.Embedding(one.vocab, one.hidden)
        self.layers = nn.ModuleList(Layer(one) for _ in range(one.layers))
        self.norm = nn.Parameter(torch.ones(one.hidden))
        self.head = nn.Linear(one.hidden, one.vocab, bias=False)
        angle = torch.arange(one.length)[:, None] * THETA ** (-torch.arange(0, one.head_dim, 2) / one.head_dim)
        self.register_buffer("cosine", angle.cos().repeat(1, 2))
        self.register_buffer("sine", angle.sin().repeat(1, 2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x, self.cosine, self.sine)
        return self.head(F.rms_norm(x, self.norm.shape, self.norm, EPS))


class PlainStep:
    """An optimizer step over random tokens: gradients of `count` micro-batches, clipped, and fused AdamW."""

    def __init__(self, run: Run, one: SimpleNamespace) -> None:
        with torch.device(run.device):
            self.model = Decoder(one).to(torch.bfloat16)
            self.ids = torch.randint(0, one.vocab, (one.count, one.micro, one.length + 1))
        self.attention: Callable[[], AbstractContextManager[None]] = flash if run.cuda else nullcontext
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4, fused=True)
        self.loss = float("nan")

    def __call__(self, number: int) -> None:
        for window in self.ids:
            with self.attention():
                logits = self.model(window[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
            (loss / len(self.ids)).backward()
        update(self.model.parameters(), self.optimizer)
        self.loss = float(loss.detach())


def flash() -> AbstractContextManager[None]:
    return sdpa_kernel(SDPBackend.FLASH_ATTENTION)  # card-only


def update(parameters: Iterable[Tensor], optimizer: torch.optim.Optimizer) -> None:
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
