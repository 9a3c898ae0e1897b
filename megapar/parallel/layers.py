"""Tensor-parallel layers. Activations are flattened tokens.

Shape letters: T tokens (batch-major: sample b, position s is token b*S + s), H hidden, F features of a layer, V vocab,
R tensor-parallel ranks. Under sequence parallelism the tokens outside the column-row pairs are split: T/R per rank.
Source: Shoeybi et al. 2019, section 3; Korthikanti et al. 2022, section 4.2.
"""

from typing import Literal

from torch import Tensor, nn

from megapar.parallel.collectives import reduce_from_region, reduce_scatter_tokens
from megapar.parallel.context import StageContext
from megapar.parallel.overlap import all_gather_matmul, copy_matmul, matmul_all_reduce, matmul_reduce_scatter
from megapar.parallel.record import Constant, Init, ParameterRecord, Split
from megapar.parallel.weight_grad import AddBias, LocalParameter, Lookup, Multiply, owned_op


class ColumnParallelLinear(nn.Module):
    """y = x @ W.T + b, W split over its output features.

    x [T, in] (sequence parallel: [T/R, in]) -> y [T, out/R]. Several logical weights that read the same input (q, k
    and v; gate and up) are stacked and multiplied at once: `outputs` is a list of (name, features, blocks) where
    blocks is the number of heads that can't be cut, or None. `sizes` holds this rank's features of each.
    Collectives: forward none (sequence parallel: all-gather), backward all-reduce (reduce-scatter).
    """

    def __init__(
        self,
        context: StageContext,
        in_features: int,
        outputs: list[tuple[str, int, int | None]],
        *,
        init: Init,
        bias: bool,
        tie: str | None = None,
    ) -> None:
        super().__init__()
        self.context = context
        weights = [
            ParameterRecord(f"{name}.weight", (features, in_features), init, (Split("tp", 0, blocks),), tie)
            for name, features, blocks in outputs
        ]
        self.owner = context.parameter(self, "weight", *weights)
        self.sizes = [piece.stop - piece.start for piece in self.owner.pieces]
        self.overlap = context.overlap(self.owner)
        self.adapter: nn.Module | None = None  # x -> what is added to y
        self.bias_owner: LocalParameter | None = None
        if bias:
            biases = [
                ParameterRecord(f"{name}.bias", (features,), Constant(0.0), (Split("tp", 0, blocks),))
                for name, features, blocks in outputs
            ]
            self.bias_owner = context.parameter(self, "bias", *biases)

    def forward(self, x: Tensor) -> Tensor:
        multiply = all_gather_matmul if self.context.splits_tokens else copy_matmul
        y = multiply(x, self.owner.tensor, self.overlap)
        y = owned_op(AddBias, y, self.bias_owner, self.context.weight_grads) if self.bias_owner else y
        return y if self.adapter is None else y + self.adapter(x)


class RowParallelLinear(nn.Module):
    """y = x @ W.T + b, W split over its input features.

    x [T, in/R] -> y [T, out] (sequence parallel: [T/R, out]). The bias is added once, after the sum.
    Collectives: forward all-reduce (sequence parallel: reduce-scatter), backward none (all-gather).
    """

    def __init__(
        self,
        context: StageContext,
        name: str,
        in_features: int,
        out_features: int,
        *,
        init: Init,
        bias: bool,
        blocks: int | None = None,
    ) -> None:
        super().__init__()
        self.context = context
        split = Split("tp", 1, blocks)
        record = ParameterRecord(f"{name}.weight", (out_features, in_features), init, (split,))
        self.owner = context.parameter(self, "weight", record)
        self.overlap = context.overlap(self.owner)
        self.adapter: nn.Module | None = None  # x -> what is added to y
        self.bias_owner: LocalParameter | None = None
        if bias:
            record = ParameterRecord(f"{name}.bias", (out_features,), Constant(0.0))
            self.bias_owner = context.parameter(self, "bias", record)

    def forward(self, x: Tensor) -> Tensor:
        multiply = matmul_reduce_scatter if self.context.splits_tokens else matmul_all_reduce
        y = multiply(x, self.owner.tensor, self.overlap)
        y = owned_op(AddBias, y, self.bias_owner, self.context.weight_grads) if self.bias_owner else y
        return y if self.adapter is None else y + self.adapter(x)


class VocabParallelEmbedding(nn.Module):
    """Rows of a table split over the vocabulary: ids [T] -> [T, H] (sequence parallel: [T/R, H]).

    A rank contributes zeros for ids it does not hold. The vocabulary need not be divisible: shards differ by one row.
    Collectives: forward all-reduce (sequence parallel: reduce-scatter), backward none (all-gather).
    """

    def __init__(
        self, context: StageContext, name: str, vocab_size: int, hidden: int, *, init: Init, tie: str | None = None
    ) -> None:
        super().__init__()
        self.context = context
        record = ParameterRecord(f"{name}.weight", (vocab_size, hidden), init, (Split("tp", 0),), tie)
        self.owner = context.parameter(self, "weight", record)
        self.first = self.owner.pieces[0].shard.box[0].start

    def forward(self, ids: Tensor) -> Tensor:
        x = owned_op(Lookup, ids - self.first, self.owner, self.context.weight_grads)
        tp = self.context.tp
        return reduce_scatter_tokens(x, tp) if self.context.splits_tokens else reduce_from_region(x, tp)


class ReplicatedEmbedding(nn.Module):
    """A learned table, the whole on every rank: row numbers [t] of this rank's tokens -> [t, H]."""

    def __init__(self, context: StageContext, name: str, rows: int, hidden: int, *, init: Init) -> None:
        super().__init__()
        self.context = context
        self.owner = context.parameter(self, "weight", ParameterRecord(f"{name}.weight", (rows, hidden), init))

    def forward(self, rows: Tensor) -> Tensor:
        return owned_op(Lookup, rows, self.owner, self.context.weight_grads)


class ReplicatedLinear(nn.Module):
    """y = x @ W.T + b, the whole on every rank: x [n, in] -> [n, out]. For what is small, behind the last layer.

    sees: `local` for this rank's tokens, `all` for rows that are the same on every tensor-parallel rank
    adapter: as of `ParameterRecord`
    """

    def __init__(
        self,
        context: StageContext,
        name: str,
        in_features: int,
        out_features: int,
        *,
        init: Init,
        sees: Literal["local", "all"] = "local",
        adapter: bool = False,
    ) -> None:
        super().__init__()
        self.context = context
        weight = ParameterRecord(f"{name}.weight", (out_features, in_features), init, sees=sees, adapter=adapter)
        self.owner = context.parameter(self, "weight", weight)
        bias = ParameterRecord(f"{name}.bias", (out_features,), Constant(0.0), sees=sees, adapter=adapter)
        self.bias_owner = context.parameter(self, "bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        y = owned_op(Multiply, x, self.owner, self.context.weight_grads)
        return owned_op(AddBias, y, self.bias_owner, self.context.weight_grads)
