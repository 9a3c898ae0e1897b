"""Where the tokens of a micro-batch stand: made once per forward of a stage, read by every layer."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megapar.parallel.context import StageContext

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Tokens:
    """The tokens of B samples of S positions each; token b*S + s is position s of sample b.

    samples: global sample numbers, int64 [B]
    length: S
    step: the optimizer step, 0 in an evaluation
    starts: where packed sequences begin, int32 [sequences + 1] with the end of the last (`kernels/attention`); None:
        every sample is one
    """

    context: StageContext
    samples: Tensor
    length: int
    step: int
    starts: Tensor | None = None

    @classmethod
    def of(cls, batch: Batch, context: StageContext) -> "Tokens":
        """Of a batch with `ids` [B, S], `samples` [B], `step`, and maybe `starts`."""
        return cls(context, batch["samples"], batch["ids"].shape[1], int(batch["step"]), batch.get("starts"))

    @property
    def count(self) -> int:
        """T = B * S."""
        return self.samples.numel() * self.length

    @cached_property
    def local(self) -> slice:
        """This rank's share of the tokens outside the tensor-parallel regions."""
        return self.context.local_tokens(self.count)

    @cached_property
    def local_positions(self) -> Tensor:
        """Position of every local token in its sample, [t]."""
        return torch.arange(self.length, device=self.samples.device).repeat(self.samples.numel())[self.local]

    @cached_property
    def local_samples(self) -> Tensor:
        """Global sample number of every local token, [t]."""
        return self.samples.repeat_interleave(self.length)[self.local]

    def rope_table(self, channels: int, theta: float) -> Tensor:
        """[S, channels] of `rope_table`."""
        return self.context.rope_table(self.length, channels, theta)
