"""What a rank has of a site: tokens, and a run of blocks (heads, features) of each."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megapar.config.sites import Site
from megapar.kernels.rope import rope
from megapar.models.attention import Attention
from megapar.models.tokens import Tokens


@dataclass(frozen=True)
class Local:
    """samples, places: of its tokens, int64 [t]: the global number of a token's sample, and where it stands there, -1
        of padding. In a text that is being written that is its slot in the cache, and its position
    first, blocks: its first block, and how many there are on all ranks; 0 and 1 where tokens are whole
    """

    samples: Tensor
    places: Tensor
    first: int
    blocks: int


@dataclass(frozen=True)
class View:
    """How a site lies in a tensor of its module. take: x [t, blocks, inner] of that tensor; put: (tensor, x) -> the
    tensor with x in place of what it has there"""

    local: Local
    take: Callable[[Tensor], Tensor]
    put: Callable[[Tensor, Tensor], Tensor]


def view_of(site: Site, module: nn.Module, tokens: Tokens) -> View:
    """Of the module's input or output, see `Site`."""
    match site.kind:
        case "attention.q" | "attention.k" | "attention.v":
            return _columns(module, "qkv".index(site.kind[-1]), tokens)
        case "attention.heads" | "cross.heads" | "mlp.inner":
            box = _owner(module).pieces[0].shard.box[1]
            whole = _owner(module).pieces[0].record.shape[1]
            size = 1 if site.kind == "mlp.inner" else _channels(module)
            local = Local(*_all(tokens), box.start // size, whole // size)
            return View(local, lambda y: y.reshape(len(y), -1, size), lambda y, x: x.reshape(y.shape))
        case "logits":
            owner = _owner(module.logits)
            local = Local(*_last(tokens), owner.pieces[0].shard.box[0].start, owner.pieces[0].record.shape[0])
            return View(local, lambda y: y.unsqueeze(2), lambda y, x: x.squeeze(2))
        case "norm":
            samples, places = _last(tokens) if tokens.new is not None else _local(tokens)
        case _:
            samples, places = _local(tokens)
    return View(Local(samples, places, 0, 1), lambda y: y.unsqueeze(1), lambda y, x: x.squeeze(1))


def _columns(module: nn.Module, number: int, tokens: Tokens) -> View:
    """Heads of q, k or v, which are columns of one matrix."""
    owner, size = _owner(module), _channels(module)
    piece = owner.pieces[number]
    local = Local(*_all(tokens), piece.shard.box[0].start // size, piece.record.shape[0] // size)

    def take(y: Tensor) -> Tensor:
        return y[:, piece.start : piece.stop].reshape(len(y), -1, size)

    def put(y: Tensor, x: Tensor) -> Tensor:
        return torch.cat([y[:, : piece.start], x.flatten(1), y[:, piece.stop :]], 1)

    return View(local, take, put)


def _owner(module: Any) -> Any:
    return module.owner


def _channels(module: Any) -> int:
    """Of a head; a product of heads keeps them together."""
    split = _owner(module).pieces[0].record.split("tp")
    dim = split.dim
    return int(_owner(module).pieces[0].record.shape[dim] // split.blocks)


def _local(tokens: Tokens) -> tuple[Tensor, Tensor]:
    return _written(tokens) if tokens.new is not None else (tokens.local_samples, tokens.local_places)


def _all(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """All tokens of a micro-batch, as every rank of a tensor-parallel region has them."""
    if tokens.new is not None:
        return _written(tokens)
    if tokens.origins is not None:
        return tokens.origins
    places = torch.arange(tokens.length, device=tokens.samples.device).repeat(tokens.samples.numel())
    return tokens.samples.repeat_interleave(tokens.length), places


def _last(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Of a text that is being written, its last token."""
    samples, places = _all(tokens)
    return (samples, places) if tokens.new is None else (samples[tokens.new.last], places[tokens.new.last])


def _written(tokens: Tokens) -> tuple[Tensor, Tensor]:
    assert tokens.new is not None
    return tokens.new.places


def attention_weights(attention: Attention, x: Tensor, tokens: Tokens, bias: Tensor | None) -> tuple[Tensor, Local]:
    """How much every query sees of each key of its row, or of its text so far: [t, n, S] of this rank's heads.

    Computed beside the forward pass, and behind it, from the layer's input x [t, H]. Collective over tp where tokens
    are split.
    """
    with torch.no_grad():
        qkv = attention.qkv(x.detach())
        if attention.qk_norm is not None:
            qkv = attention.qk_norm(qkv, attention.qkv.sizes)
        heads, kv_heads, _ = (size // attention.channels for size in attention.qkv.sizes)
        q, k, _ = qkv.view(len(qkv), -1, attention.channels).split([heads, kv_heads, kv_heads], 1)
        if attention.rotary is not None:
            table, length = tokens.rope_table(attention.rotary)
            q, k = (one.reshape(-1, length, *one.shape[1:]) for one in (q, k))
            q, k = (turned.flatten(0, 1) for turned in rope(q, k, table))
        if tokens.new is not None:
            found = _of_texts(attention, q, tokens, bias)
        else:
            found = _of_rows(attention, q, k, tokens, bias)
    piece = attention.qkv.owner.pieces[0]
    first, blocks = (size // attention.channels for size in (piece.shard.box[0].start, piece.record.shape[0]))
    return found.to(qkv.dtype), Local(*_all(tokens), first, blocks)


def _of_rows(attention: Attention, q: Tensor, k: Tensor, tokens: Tokens, bias: Tensor | None) -> Tensor:
    """q [T, n, D], k [T, K, D] of B rows of S tokens -> [T, n, S]."""
    q, k = (one.view(-1, tokens.length, *one.shape[1:]).transpose(1, 2) for one in (q, k))
    seen = _seen(attention, tokens).unsqueeze(1)
    return _weights(attention, q, k, seen, bias).transpose(1, 2).flatten(0, 1)


def _of_texts(attention: Attention, q: Tensor, tokens: Tokens, bias: Tensor | None) -> Tensor:
    """q [T, n, D] of new tokens of texts that are being written -> [T, n, L], 0 behind a text's end."""
    new = tokens.new
    assert new is not None
    keys, _ = new.cache.layer(attention.index, q)
    found = q.new_zeros(len(q), q.shape[1], max(new.lengths), dtype=torch.float64)
    for slot, count, length, end in zip(new.slots, new.counts, new.lengths, new.ends, strict=True):
        places = torch.arange(length, device=q.device)
        back = places[-count:, None] - places
        seen = back >= 0 if attention.window is None else (back >= 0) & (back < attention.window)
        own = q[end - count : end].transpose(0, 1)
        own_bias = None if bias is None else bias[:, back.clamp(min=0)]
        found[end - count : end, :, :length] = _weights(
            attention, own, keys[slot, :, :length], seen, own_bias
        ).transpose(0, 1)
    return found


def _weights(attention: Attention, q: Tensor, k: Tensor, seen: Tensor, bias: Tensor | None) -> Tensor:
    """q [..., n, S, D], k [..., K, L, D], seen: which keys a query sees, bool [..., S, L] -> fp64 [..., n, S, L]."""
    scale = 1.0 / math.sqrt(attention.channels) if attention.scale is None else attention.scale
    k = k.double().repeat_interleave(q.shape[-3] // k.shape[-3], -3)
    scores = q.double() @ k.transpose(-1, -2) * scale
    if attention.softcap is not None:
        scores = attention.softcap * torch.tanh(scores / attention.softcap)
    if bias is not None:
        scores = scores + bias.double()
    return torch.softmax(scores.masked_fill(~seen, -math.inf), -1)


def _seen(attention: Attention, tokens: Tokens) -> Tensor:
    """Which keys a query sees, bool [B, S, S]."""
    count, length, device = tokens.samples.numel(), tokens.length, tokens.samples.device
    places = torch.arange(length, device=device)
    back = places.unsqueeze(1) - places
    seen = back >= 0 if attention.causal else torch.ones_like(back, dtype=torch.bool)
    if attention.window is not None:
        seen = seen & (back < attention.window)
    if tokens.starts is None:
        return seen.expand(count, length, length)
    rows = torch.arange(count * length, device=device)
    sequence = torch.searchsorted(tokens.starts[1:].long(), rows, right=True).view(count, length)
    return seen & (sequence.unsqueeze(2) == sequence.unsqueeze(1))
