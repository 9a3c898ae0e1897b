"""Biases of attention's scores by distance, learned for every head (Raffel et al. 2020, section 2.1)."""

import math

import torch
from torch import Tensor, nn

from megapar.config.schema import ModelConfig
from megapar.models.tokens import Tokens
from megapar.parallel.context import StageContext
from megapar.parallel.record import Normal, ParameterRecord, Split
from megapar.parallel.weight_grad import owned_op


class RelativeBias(nn.Module):
    """(S, L) -> [N, S, L] in the wide dtype, of this rank's heads: one table for all layers of a stack, of which every
    stage that has some of them holds a copy. Query i is at position first + i, key j at j."""

    def __init__(self, context: StageContext, model: ModelConfig, name: str) -> None:
        super().__init__()
        self.context = context
        self.buckets, self.distance = model.relative_buckets, model.relative_distance
        self.causal = model.causal
        record = ParameterRecord(
            f"{name}.weight", (self.buckets, model.heads), Normal(model.init_std), (Split("tp", 1, model.heads),), name,
            table=True,
        )  # fmt: skip
        self.owner = context.parameter(self, "weight", record)

    def forward(self, queries: int, keys: int, first: int = 0) -> Tensor:
        # Element d is of the distance d - (first + queries - 1), of a key from its query.
        distances = torch.arange(queries + keys - 1, device=self.context.device) - (first + queries - 1)
        bucket = buckets(distances, self.buckets, self.distance, self.causal)
        chosen = nn.functional.one_hot(bucket, self.buckets).to(self.context.wide_dtype)
        by_distance_ND = owned_op(_Chosen, chosen, self.owner, self.context.weight_grads)
        return by_distance_ND.unfold(1, keys, 1).flip(1)

    def of(self, tokens: Tokens) -> Tensor:
        """What attention takes as its bias."""
        if tokens.new is not None:
            return self.back(tokens.new.cache.capacity)
        longest = tokens.longest or tokens.length
        return self(longest, longest)

    def back(self, most: int) -> Tensor:
        """[N, most]: of keys that are 0, 1, 2, ... in front of their query."""
        return self(1, most, most - 1)[:, 0].flip(1)


class _Chosen:
    """y = (chosen @ weight).T: chosen [D, buckets] with a single 1 in every row, weight [buckets, N] -> [N, D]. A
    product, as its gradient is then a sum in one order."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return (x @ weight.to(x.dtype)).t().contiguous()

    @staticmethod
    def input_grad(grad: Tensor, x: Tensor, weight: Tensor) -> None:
        return None

    @staticmethod
    def add_weight_grad(grad: Tensor, x: Tensor, into: Tensor) -> None:
        into.add_((grad @ x).t())


def buckets(distances: Tensor, count: int, most: int, causal: bool) -> Tensor:
    """The bucket of every distance of a key from its query, int64 of the same shape: half of them are of one distance
    each, the others grow with it, up to `most`. causal: of keys in front alone; else half are for those behind."""
    first = torch.zeros_like(distances)
    if not causal:
        count //= 2
        first = torch.where(distances > 0, count, 0)
    back = -distances.clamp(max=0) if causal else distances.abs()
    exact = count // 2
    # In fp32, as models are trained with: the border of a bucket depends on it.
    share = torch.log(back.clamp(min=1).float() / exact) / math.log(most / exact)
    far = exact + (share * (count - exact)).to(torch.int64)
    return first + torch.where(back < exact, back, far.clamp(max=count - 1))
