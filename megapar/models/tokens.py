"""Where the tokens of a micro-batch stand: made once per forward of a stage, read by every layer."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megapar.parallel.cache import KVCache, NewTokens
from megapar.parallel.context import StageContext
from megapar.parallel.rotary import Rotary

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Tokens:
    """The tokens of B samples of S positions each; token b*S + s is position s of sample b.

    samples: global sample numbers, int64 [B]
    length: S
    step: the optimizer step, 0 in an evaluation
    starts: where packed sequences begin, int32 [sequences + 1] with the end of the last (`kernels/attention`); None:
        every sample is one
    positions: of the tokens in their texts, int64 [B, S], where they are not those in the samples: with `starts` alone
    types: token types, int64 [B, S]; None: all 0
    lengths: tokens of each text, which padding follows, int64 [B]; None: all of the sample
    new: of texts that are being written, with `positions`: the tokens stand behind others, which are cached. The
        samples' borders mean nothing then
    longest: most tokens of a sequence, if it is not a sample's
    kinds, media: in a model of media, int64 [B, S]: 0 of text, else the number of a medium (`MEDIA`, from 1), and which
        of its tokens in the micro-batch stands there
    origins: of tokens that are not samples of one length, as patches: for each its global sample number, and its place
        among those of this kind in its sample, -1 of padding, int64 [T] each. They are all one row then
    """

    context: StageContext
    samples: Tensor
    length: int
    step: int
    starts: Tensor | None = None
    positions: Tensor | None = None
    types: Tensor | None = None
    lengths: Tensor | None = None
    new: NewTokens | None = None
    longest: int | None = None
    kinds: Tensor | None = None
    media: Tensor | None = None
    origins: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, batch: Batch, context: StageContext, cache: KVCache | None = None) -> "Tokens":
        """Of a batch with `ids` [B, S], `samples` [B], `step`, and maybe `starts`, `positions`, `types`, `lengths`,
        `kinds` and `media`; with a cache also what `NewTokens` takes."""
        names = "starts", "positions", "types", "lengths", "kinds", "media"
        more: dict[str, Any] = {name: batch.get(name) for name in names}
        new = None if cache is None else NewTokens.of(batch, cache)
        return cls(context, batch["samples"], batch["ids"].shape[1], int(batch["step"]), new=new, **more)

    @classmethod
    def of_source(cls, batch: Batch, context: StageContext) -> "Tokens":
        """Of what an encoder reads: `source` [B, L], and maybe `source_starts`, `source_positions` and
        `source_longest`."""
        more: dict[str, Any] = {name: batch.get(f"source_{name}") for name in ("starts", "positions")}
        if "source_longest" in batch:
            more["longest"] = int(batch["source_longest"])
        return cls(context, batch["samples"], batch["source"].shape[1], int(batch["step"]), **more)

    @classmethod
    def of_medium(cls, batch: Batch, context: StageContext, name: str) -> "Tokens":
        """Of what the encoder of a medium reads: of its tokens in the whole micro-batch, T of them, `NAME_starts`,
        where each image or sound begins, `NAME_samples` [T] and `NAME_order` [T], see `origins`."""
        samples = batch[f"{name}_samples"]
        origins = samples, batch[f"{name}_order"]
        return cls(
            context, samples[:1], len(samples), int(batch["step"]), starts=batch[f"{name}_starts"], origins=origins
        )

    @property
    def count(self) -> int:
        """T = B * S."""
        return self.samples.numel() * self.length

    @cached_property
    def local(self) -> slice:
        """This rank's share of the tokens outside the tensor-parallel regions."""
        return self.context.local_tokens(self.count)

    @cached_property
    def local_places(self) -> Tensor:
        """Position of every local token in its sample, [t]."""
        if self.origins is not None:
            return self.origins[1][self.local]
        return torch.arange(self.length, device=self.samples.device).repeat(self.samples.numel())[self.local]

    @property
    def local_positions(self) -> Tensor:
        """Position of every local token in its text, [t]."""
        return self.local_places if self.positions is None else self.positions.reshape(-1)[self.local]

    @cached_property
    def text_lengths(self) -> Tensor:
        """Tokens of each text, [B]."""
        return torch.full_like(self.samples, self.length) if self.lengths is None else self.lengths

    @cached_property
    def local_types(self) -> Tensor:
        """Type of every local token, [t]."""
        if self.types is None:
            return torch.zeros_like(self.local_places)
        return self.types.reshape(-1)[self.local]

    @cached_property
    def local_samples(self) -> Tensor:
        """Global sample number of every local token, [t]."""
        if self.origins is not None:
            return self.origins[0][self.local]
        return self.samples.repeat_interleave(self.length)[self.local]

    def rope_table(self, rotary: Rotary) -> tuple[Tensor, int]:
        """(turns, rows of a text that they are for): [S, channels] for every sample alike, or those of all T tokens."""
        if self.positions is None:
            return self.context.rope_table(self.length, rotary), self.length
        if rotary not in self._turns:
            length = self.length if self.new is None else self.new.cache.capacity
            self._turns[rotary] = self.context.rope_table(length, rotary)[self.positions.reshape(-1)]
        return self._turns[rotary], self.count

    @cached_property
    def _turns(self) -> dict[Rotary, Tensor]:
        return {}


class Memory(NamedTuple):
    """An encoder's output, x [t, H], and where its tokens stand."""

    x_tH: Tensor
    tokens: Tokens
