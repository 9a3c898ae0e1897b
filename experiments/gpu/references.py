"""What kernels must compute, in fp64, written without them: attention by its definition, and cross entropy."""

import math

import torch
from torch import Tensor

Span = tuple[int, int, int, int]  # of a sequence: first and last query row, first and last key row


def attention(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, dlse: Tensor, spans: list[Span], causal: bool,
    window: tuple[int | None, int | None] | None, softcap: float | None, bias: Tensor | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """o, lse, dq, dk, dv, of a bias [heads, queries, keys] dbias in fp64. Rows of all sequences lie one after another:
    q [rows, heads, channels]."""
    share = q.shape[1] // k.shape[1]
    found = {
        "o": q.new_zeros(*q.shape[:2], v.shape[2], dtype=torch.float64),
        "lse": q.new_full(q.shape[:2], -math.inf, dtype=torch.float64),
        **{name: torch.zeros_like(x, dtype=torch.float64) for name, x in (("dq", q), ("dk", k), ("dv", v))},
    }
    if bias is not None:
        found["dbias"] = torch.zeros_like(bias, dtype=torch.float64)
    for begin, end, first, last in spans:
        if begin == end or first == last:
            continue
        seen = seen_of(end - begin, last - first, causal, window, q.device)
        for group in range(k.shape[1]):
            mine = slice(group * share, (group + 1) * share)
            x = q[begin:end, mine].detach().double().transpose(0, 1).requires_grad_()
            y, z = (t[first:last, group].detach().double().requires_grad_() for t in (k, v))
            place = mine, slice(end - begin), slice(last - first)
            added = [] if bias is None else [bias[place].detach().double().requires_grad_()]
            out, log = group_of(x, y, z, seen, softcap, *added)
            given = do[begin:end, mine].double().transpose(0, 1), dlse[begin:end, mine].double().t()
            dx, dy, dz, *dbias = torch.autograd.grad([out, log], [x, y, z, *added], given)
            found["o"][begin:end, mine], found["lse"][begin:end, mine] = out.detach().transpose(0, 1), log.detach().t()
            found["dq"][begin:end, mine] = dx.transpose(0, 1)
            found["dk"][first:last, group], found["dv"][first:last, group] = dy, dz
            for gradient in dbias:
                found["dbias"][place] += gradient
    return found


def seen_of(
    queries: int, keys: int, causal: bool, window: tuple[int | None, int | None] | None, device: torch.device
) -> Tensor:
    """[queries, keys]: which keys a query sees. The last query stands at the last key."""
    left, right = window or (None, None)
    place = torch.arange(queries, device=device)[:, None] + keys - queries
    key = torch.arange(keys, device=device)
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device)
    for limit in ((key <= place) if causal else None, None if left is None else key >= place - left):
        seen = seen if limit is None else seen & limit
    return seen if right is None else seen & (key <= place + right)


def group_of(
    x: Tensor, y: Tensor, z: Tensor, seen: Tensor, softcap: float | None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(o [heads, queries, channels], log-sum-exp [heads, queries]) of the heads that share keys y and values z."""
    scores = x @ y.t() * x.shape[-1] ** -0.5
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores if bias is None else scores + bias
    scores = scores.masked_fill(~seen, -math.inf)
    highest = scores.detach().amax(-1, keepdim=True)
    highest = highest.masked_fill(highest == -math.inf, 0.0)
    weight = torch.exp(scores - highest)
    total = weight.sum(-1, keepdim=True)
    none = total == 0
    total = total.masked_fill(none, 1.0)
    return weight @ z / total, (highest + total.log()).masked_fill(none, -math.inf).squeeze(-1)


def cross_entropy(
    logits: Tensor, targets: Tensor, share: Tensor, smoothing: float = 0.0, z: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(losses [T], gradient [T, V] of the sum of losses times share [T]) in fp64."""
    x, spread = logits.double(), smoothing / logits.shape[1]
    log_sum = torch.logsumexp(x, 1)
    losses = log_sum - (1 - smoothing) * x.gather(1, targets[:, None])[:, 0] + z * log_sum.square()
    losses = losses - spread * x.sum(1) if smoothing else losses
    gradient = torch.exp(x - log_sum[:, None]) * (1 + 2 * z * log_sum)[:, None] - spread
    gradient[torch.arange(len(x), device=x.device), targets] -= 1 - smoothing
    return losses, gradient * share.double()[:, None]


def statistics(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """What a first pass over the logits finds: the largest, the sum of exp beside it, the target's, their sum."""
    x = logits.double()
    largest = x.amax(1)
    sums = torch.exp(x - largest[:, None]).sum(1)
    return {"largest": largest, "sums": sums, "target": x.gather(1, targets[:, None])[:, 0], "total": x.sum(1)}
