"""The reference: a plain torch model and training loop on one device. It imports nothing of megapar.

Written from the formulas, with nn.Linear, F.cross_entropy and torch.optim.AdamW, so that an error in megapar's layers,
gradients, clipping or optimizer can't be here as well. Names follow megapar's logical parameter names.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    def __init__(self, hidden: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(hidden)), eps

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt() * self.weight


def make_norm(c: dict) -> nn.Module:
    return nn.LayerNorm(c["hidden"], c["norm_eps"]) if c["layernorm"] else RMSNorm(c["hidden"], c["norm_eps"])


def rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary embedding by complex multiplication of the pairs (i, i + D/2); x [B, N, S, D]."""
    length, channels = x.shape[-2:]
    half = channels // 2
    angle = torch.arange(length).double()[:, None] / theta ** (torch.arange(half).double() / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle).to(
        torch.complex128 if x.dtype == torch.float64 else torch.complex64
    )
    return torch.cat([turned.real, turned.imag], -1)


class Layer(nn.Module):
    def __init__(self, c: dict) -> None:
        super().__init__()
        self.c = c
        hidden, width, kv_width = c["hidden"], c["heads"] * c["head_dim"], c["kv_heads"] * c["head_dim"]
        self.norm1, self.norm2 = make_norm(c), make_norm(c)
        sizes = {"q": (hidden, width), "k": (hidden, kv_width), "v": (hidden, kv_width), "out": (width, hidden)}
        self.attention = nn.ModuleDict({name: nn.Linear(*size, bias=c["bias"]) for name, size in sizes.items()})
        sizes = {"up": (hidden, c["ffn"]), "down": (c["ffn"], hidden)}
        if c["activation"] != "gelu":
            sizes["gate"] = (hidden, c["ffn"])
        self.mlp = nn.ModuleDict({name: nn.Linear(*size, bias=c["bias"]) for name, size in sizes.items()})

    def forward(self, x: Tensor) -> Tensor:
        c, at, mlp = self.c, self.attention, self.mlp
        batch, length, _ = x.shape
        y = self.norm1(x)
        q, k, v = (at[name](y).view(batch, length, -1, c["head_dim"]).transpose(1, 2) for name in "qkv")
        if c["rope"]:
            q, k = rotate(q, c["rope_theta"]), rotate(k, c["rope_theta"])
        k, v = (t.repeat_interleave(c["heads"] // c["kv_heads"], 1) for t in (k, v))
        scores = q @ k.transpose(2, 3) / math.sqrt(c["head_dim"])
        scores = scores + torch.full((length, length), -math.inf).triu(1).to(x.dtype)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, -1)
        x = x + at["out"](y)
        y = self.norm2(x)
        inner = mlp["up" if c["activation"] == "gelu" else "gate"](y)
        inner = F.silu(inner) if c["activation"] == "swiglu" else F.gelu(inner, approximate="tanh")
        y = inner if c["activation"] == "gelu" else inner * mlp["up"](y)
        return x + mlp["down"](y)


class Model(nn.Module):
    def __init__(self, c: dict) -> None:
        super().__init__()
        self.c = c
        self.embedding = nn.Embedding(c["vocab_size"], c["hidden"])
        self.positions = None if c["rope"] else nn.Embedding(c["positions"], c["hidden"])
        self.layers = nn.ModuleList(Layer(c) for _ in range(c["layers"]))
        self.norm = make_norm(c)
        self.head = nn.Linear(c["hidden"], c["vocab_size"], bias=False)
        if c["tied"]:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        if self.positions is not None:
            x = x + self.positions(torch.arange(ids.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def train(c: dict, weights: dict[str, Tensor], batches: list[Tensor], optim: dict, lrs: list[float]) -> list[dict]:
    """Train on windows [n, S + 1], one batch per step. Returns per step: loss, grad_norm, grads, weights (by name)."""
    model = Model(c).double()
    model.load_state_dict(weights, strict=not c["tied"])
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": optim["weight_decay"]}, {"params": others, "weight_decay": 0.0}],
        betas=(optim["beta1"], optim["beta2"]),
        eps=optim["eps"],
    )
    history = []
    for windows, lr in zip(batches, lrs, strict=True):
        adamw.zero_grad()
        logits = model(windows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        named = dict(model.named_parameters())
        grads = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), optim["clip_grad"])
        for group in adamw.param_groups:
            group["lr"] = lr
        adamw.step()
        state = {name: p.detach().clone() for name, p in named.items()}
        history.append({"loss": loss.item(), "grad_norm": norm.item(), "grads": grads, "weights": state})
    return history
