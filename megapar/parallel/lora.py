"""Low-rank adapters beside tensor-parallel layers: y = W x + scale * B A x, of which A and B alone are trained.

A stands on the side of the hidden width and B on the other, or the other way round, so that what tensor-parallel ranks
exchange has the adapter's rank in place of a layer's width: [T, r], where the layer itself sends [T, H].
Source: Hu et al. 2021, section 4.1. Shape letters as in `parallel/layers.py`; r rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megapar.config.model_schema import LoraConfig
from megapar.parallel.collectives import (
    copy_to_region,
    gather_into_region,
    reduce_from_region,
    reduce_scatter_tokens,
)
from megapar.parallel.context import StageContext
from megapar.parallel.record import Constant, Normal, ParameterRecord, Split
from megapar.parallel.weight_grad import LocalParameter, Multiply, owned_op

A, B = "lora_A.weight", "lora_B.weight"  # behind the name of the matrix, as PEFT has them


def _record_a(name: str, lora: LoraConfig, inputs: int, *splits: Split) -> ParameterRecord:
    # The variance of torch's and PEFT's uniform distribution, 1 / (3 * inputs).
    init = Normal((3 * inputs) ** -0.5)
    return ParameterRecord(f"{name}.{A}", (lora.rank, inputs), init, splits, adapter=True)


def _record_b(name: str, lora: LoraConfig, features: int, *splits: Split) -> ParameterRecord:
    return ParameterRecord(f"{name}.{B}", (features, lora.rank), Constant(0.0), splits, adapter=True)


class ColumnAdapter(nn.Module):
    """What is added to a column-parallel layer's y: x [T, in] (sequence parallel: [T/R, in]) -> [T, out/R].

    outputs: (name, features, blocks) of the layer, each with an A of its own; those that `lora` does not adapt add 0.
    Collectives: as of the layer, of [T, n r] for n adapted outputs.
    """

    def __init__(
        self, context: StageContext, lora: LoraConfig, inputs: int, outputs: Sequence[tuple[str, int, int | None]]
    ) -> None:
        super().__init__()
        self.context, self.scale = context, lora.scale
        adapted = [(name, features, blocks) for name, features, blocks in outputs if lora.adapts(_last(name))]
        self.owner_a = context.parameter(self, "a", *(_record_a(name, lora, inputs) for name, _, _ in adapted))
        self.owners: list[LocalParameter | int] = []  # an adapter's, or the features of an output without
        for number, (name, features, blocks) in enumerate(outputs):
            split = Split("tp", 0, blocks)
            if lora.adapts(_last(name)):
                self.owners.append(context.parameter(self, f"b{number}", _record_b(name, lora, features, split)))
            else:
                place, _ = split.part(features, context.tp.size, context.tp.index)
                self.owners.append(place.stop - place.start)

    def forward(self, x: Tensor) -> Tensor:
        context, weight_grads = self.context, self.context.weight_grads
        u = owned_op(Multiply, x, self.owner_a, weight_grads)
        u = gather_into_region(u, context.tp) if context.splits_tokens else copy_to_region(u, context.tp)
        inner = iter(u.chunk(len(self.owner_a.pieces), 1))
        parts = [
            u.new_zeros(len(u), one) if isinstance(one, int) else owned_op(Multiply, next(inner), one, weight_grads)
            for one in self.owners
        ]
        return torch.cat(parts, 1) * self.scale


class RowAdapter(nn.Module):
    """What is added to a row-parallel layer's y: x [T, in/R] -> [T, out] (sequence parallel: [T/R, out]).

    Collectives: as of the layer, of [T, r].
    """

    def __init__(
        self, context: StageContext, lora: LoraConfig, name: str, inputs: int, features: int, blocks: int | None
    ) -> None:
        super().__init__()
        self.context, self.scale = context, lora.scale
        self.owner_a = context.parameter(self, "a", _record_a(name, lora, inputs, Split("tp", 1, blocks)))
        self.owner_b = context.parameter(self, "b", _record_b(name, lora, features))

    def forward(self, x: Tensor) -> Tensor:
        context = self.context
        u = owned_op(Multiply, x, self.owner_a, context.weight_grads)
        u = reduce_scatter_tokens(u, context.tp) if context.splits_tokens else reduce_from_region(u, context.tp)
        return owned_op(Multiply, u, self.owner_b, context.weight_grads) * self.scale


def _last(name: str) -> str:
    """`q` of `layers.0.attention.q`."""
    return name.rpartition(".")[2]
