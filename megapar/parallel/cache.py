"""Keys and values of the tokens that a rank's layers have seen, so that the next ones attend to them without computing
them again. A rank keeps those of its own layers and heads.

Texts are ragged: a micro-batch brings any number of new tokens of each, one behind another, so that no text is padded
and what is computed for one does not depend on the others. Source: Pope et al. 2022, "Efficiently scaling Transformer
inference", section 3; Yu et al. 2022, "Orca", section 3 (texts that come and go between steps).

Shape letters: T new tokens of a micro-batch, of n texts; N query heads, K key/value heads, D channels, L cached tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate

import torch
from torch import Tensor

from megapar.kernels.attention import attention
from megapar.kernels.rope import rope

Batch = dict[str, Tensor]


class KVCache:
    """Of `texts` texts of up to `capacity` tokens each, by slot. A layer's memory is taken when it first writes.

    source: of what an encoder has read for each, which layers of its decoder attend to; None without an encoder
    """

    def __init__(self, texts: int, capacity: int, source: "KVCache | None" = None) -> None:
        self.texts, self.capacity, self.source = texts, capacity, source
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, index: int, k: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, [texts, K, capacity, D] each, whose new keys are k [T, K, D]."""
        if index not in self._layers:
            shape = (self.texts, k.shape[1], self.capacity, k.shape[2])
            # Zeros: what lies behind a text's end is multiplied by a weight of 0.
            self._layers[index] = k.new_zeros(shape), k.new_zeros(shape)
        return self._layers[index]

    def clear(self, slot: int) -> None:
        """Forget what is not finite: 0 times it would not be 0 for the slot's next text."""
        for layer in self._layers.values():
            for tensor in layer:
                tensor[slot] = 0.0
        if self.source is not None:
            self.source.clear(slot)

    @property
    def bytes(self) -> int:
        """Memory taken on this rank so far."""
        own = sum(tensor.nbytes for layer in self._layers.values() for tensor in layer)
        return own + (self.source.bytes if self.source is not None else 0)


@dataclass(frozen=True)
class NewTokens:
    """The tokens of a micro-batch and where they go: text i brings `counts[i]`, and has `lengths[i]` with them in
    `slots[i]` of the cache.

    source: where what an encoder has read for these texts is cached; read: where that goes which it has just read
    """

    cache: KVCache
    slots: list[int]
    counts: list[int]
    lengths: list[int]
    device: torch.device
    source: "NewTokens | None" = None
    read: "NewTokens | None" = None

    @classmethod
    def of(cls, batch: Batch, cache: KVCache) -> "NewTokens":
        """Of a batch with `slots`, `counts` and `lengths`, int64 [n] each, on the CPU; with an encoder also
        `source_lengths` [n], and `source_new` [n], which of them it reads now."""
        slots, counts, lengths = (batch[name].tolist() for name in ("slots", "counts", "lengths"))
        device, source, read = batch["ids"].device, None, None
        if cache.source is not None:
            sizes, new = batch["source_lengths"].tolist(), batch["source_new"].tolist()
            source = cls(cache.source, slots, counts, sizes, device)
            chosen = [text for text, reads in enumerate(new) if reads]
            if chosen:
                there = [sizes[text] for text in chosen]
                read = cls(cache.source, [slots[text] for text in chosen], there, there, device)
        return cls(cache, slots, counts, lengths, device, source, read)

    @cached_property
    def ends(self) -> list[int]:
        return list(accumulate(self.counts))

    @cached_property
    def last(self) -> Tensor:
        """The row of every text's last token, [n]."""
        return torch.tensor(self.ends, device=self.device) - 1

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """(slot, position) of every token, [T] each."""
        of_texts = list(zip(self.slots, self.counts, self.lengths, strict=True))
        slots = [slot for slot, count, _ in of_texts for _ in range(count)]
        positions = [place for _, count, length in of_texts for place in range(length - count, length)]
        return torch.tensor(slots, device=self.device), torch.tensor(positions, device=self.device)

    def write(self, into: Tensor, x: Tensor) -> None:
        """x [T, K, D] to where its tokens stand in `into` [texts, K, capacity, D]."""
        if len(self.slots) == 1:
            into[self.slots[0], :, self.lengths[0] - self.counts[0] : self.lengths[0]] = x.transpose(0, 1)
        else:
            slots, positions = self.places
            into[slots, :, positions] = x

    @cached_property
    def singles(self) -> "tuple[NewTokens, Tensor] | None":
        """The texts that bring one token, and its rows; None: there are none."""
        chosen = [text for text, count in enumerate(self.counts) if count == 1]
        slots, lengths = ([values[text] for text in chosen] for values in (self.slots, self.lengths))
        rows = torch.tensor([self.ends[text] - 1 for text in chosen], device=self.device)
        return (NewTokens(self.cache, slots, [1] * len(chosen), lengths, self.device), rows) if chosen else None

    @cached_property
    def chosen(self) -> slice | Tensor:
        """What picks the slots: neighbours are read where they lie."""
        first, count = self.slots[0], len(self.slots)
        if self.slots == list(range(first, first + count)):
            return slice(first, first + count)
        return torch.tensor(self.slots, device=self.device)

    def seen(self, window: int | None) -> tuple[slice, Tensor | None]:
        """Of texts that bring one token: (positions that any of them sees, which of those each does not [n, 1, 1, L]).
        None: each sees all."""
        if window not in self._seen:
            width = max(self.lengths) if window is None else window
            span = slice(max(0, min(self.lengths) - width), max(self.lengths))
            hidden = None
            if min(self.lengths) < max(self.lengths):
                positions = torch.arange(span.start, span.stop, device=self.device)
                ends = torch.tensor(self.lengths, device=self.device).unsqueeze(1)
                hidden = ((positions >= ends) | (positions < ends - width))[:, None, None]
            self._seen[window] = span, hidden
        return self._seen[window]

    def back(self, span: slice) -> Tensor:
        """How far every position of a span is in front of each text's last one, at least 0, [n, L]."""
        if "back" not in self._kept:
            last = torch.tensor(self.lengths, device=self.device).unsqueeze(1) - 1
            self._kept["back"] = (last - torch.arange(span.start, span.stop, device=self.device)).clamp(min=0)
        return self._kept["back"]

    @cached_property
    def _kept(self) -> dict[str, Tensor]:
        return {}

    @cached_property
    def _seen(self) -> dict[int | None, tuple[slice, Tensor | None]]:
        return {}


def attend_cached(
    qkv: Tensor,
    heads: int,
    kv_heads: int,
    new: NewTokens,
    layer: int,
    *,
    table: Tensor | None,
    window: int | None,
    scale: float | None,
    softcap: float | None,
    bias: Tensor | None = None,
) -> Tensor:
    """Causal attention of new tokens over their texts: qkv [T, (N + 2 K) D] -> [T, N D]. Writes their keys and values
    to the cache of this layer. table: of rotary positions, [T, D]; bias: [N, capacity], of scores by how far a key is
    back; the others as of `attend_`."""
    by_head = qkv.view(len(qkv), heads + 2 * kv_heads, -1)
    q, k, v = by_head.split([heads, kv_heads, kv_heads], 1)
    if table is not None:
        q, k = (turned.squeeze(0) for turned in rope(q.unsqueeze(0), k.unsqueeze(0), table))
    keys, values = new.cache.layer(layer, k)
    new.write(keys, k)
    new.write(values, v)
    scale = 1.0 / math.sqrt(q.shape[2]) if scale is None else scale
    sides = None if window is None else (window - 1, None)
    attend = partial(attention, window=sides, scale=scale, softcap=softcap)
    return _attend(q, keys, values, new, attend, window, scale, softcap, bias)


def attend_source(
    q: Tensor, kv: Tensor | None, kv_heads: int, new: NewTokens, layer: int, scale: float | None, softcap: float | None
) -> Tensor:
    """Attention of new tokens, q [T, N, D], to all that an encoder has read for their texts -> [T, N D].

    kv: [T', 2 K D] of what it has just read, which is written to the cache of this layer; None if that is nothing
    """
    assert new.source is not None and new.cache.source is not None
    if kv is not None:
        assert new.read is not None
        k, v = kv.view(len(kv), 2, kv_heads, -1).unbind(1)
        keys, values = new.cache.source.layer(layer, k)
        new.read.write(keys, k)
        new.read.write(values, v)
    keys, values = new.cache.source.layer(layer, q)
    scale = 1.0 / math.sqrt(q.shape[2]) if scale is None else scale
    attend = partial(attention, causal=False, scale=scale, softcap=softcap)
    return _attend(q, keys, values, new.source, attend, None, scale, softcap)


def _attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    new: NewTokens,
    attend: Callable[..., Tensor],
    window: int | None,
    scale: float,
    softcap: float | None,
    bias: Tensor | None = None,
) -> Tensor:
    """attend: of a text that brings several tokens, q [1, S, N, D], k and v [1, L, K, D] -> [1, S, N, D]."""
    if max(new.counts) == 1:
        return _attend_singles(q, keys, values, new, window, scale, softcap, bias).flatten(1)
    out = q.new_empty(q.shape)
    for slot, count, length, end in zip(new.slots, new.counts, new.lengths, new.ends, strict=True):
        if count > 1:
            cached = (x[slot, :, :length].transpose(0, 1).unsqueeze(0) for x in (keys, values))
            own = slice(end - count, end)
            more = {}
            if bias is not None:
                places = torch.arange(length, device=q.device)
                more["bias"] = bias[:, (places[-count:, None] - places).clamp(min=0)]
            out[own] = attend(q[own].unsqueeze(0), *cached, **more)[0]
    if new.singles is not None:
        singles, rows = new.singles
        out[rows] = _attend_singles(q[rows], keys, values, singles, window, scale, softcap, bias)
    return out.flatten(1)


def _attend_singles(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    new: NewTokens,
    window: int | None,
    scale: float,
    softcap: float | None,
    bias: Tensor | None,
) -> Tensor:
    """Of one token of each text, all at once: q [n, N, D], keys and values [texts, K, capacity, D] -> [n, N, D]."""
    span, hidden = new.seen(window)
    k, v = (x[new.chosen][:, :, span] for x in (keys, values))
    by_group = (q * scale).unflatten(1, (k.shape[1], -1))
    scores = by_group @ k.transpose(2, 3)  # [n, K, N / K, L]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    if softcap is not None:
        scores = softcap * torch.tanh(scores.to(wide) / softcap)
    if bias is not None:
        scores = scores.to(wide) + bias[:, new.back(span)].transpose(0, 1).unflatten(1, scores.shape[1:3])
    if hidden is not None:
        scores = scores.masked_fill(hidden, -math.inf)
    return (torch.softmax(scores, -1, dtype=wide).to(q.dtype) @ v).flatten(1, 2)
