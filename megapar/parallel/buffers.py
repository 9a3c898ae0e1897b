"""A rank's parameters and main gradients in buckets: each owns its memory and knows over whom its gradients are summed.

Parameters lie in reverse order of construction, so that buckets fill up in the order of backward; a bucket holds
parameters of one stage. Its size is a multiple of the ranks of its axis, which makes ZeRO-1's shards equal slices.
Padding stays zero. What belongs to buckets (parameters, gradients, optimizer state) is a list with a tensor for each.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from megapar.mesh import Axis
from megapar.parallel.collectives import start_all_gather, wait_for
from megapar.parallel.context import StageContext
from megapar.parallel.initial import fill
from megapar.parallel.plain import hook_plain_gradient
from megapar.parallel.record import Given
from megapar.parallel.weight_grad import LocalParameter, Piece

K = TypeVar("K", bound=Hashable)
_ALIGN = 16  # elements: a cache line of fp32


@dataclass(eq=False)
class Bucket:
    """Parameters of one stage whose gradients are summed together.

    axis: over which they are summed: the ranks that hold the same and take other samples
    offsets: where each parameter begins; size: elements, with padding
    owned: the part whose optimizer state this rank holds: with ZeRO-1 an equal slice, else everything
    params [size] in the compute dtype and grads [size] (main gradients) in the wide one have storages of their own
    """

    stage: int
    axis: Axis
    offsets: dict[LocalParameter, int]
    size: int
    owned: slice
    params: Tensor = field(default_factory=lambda: torch.empty(0))
    grads: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def tie(self) -> str | None:
        """A tied parameter has a bucket of its own."""
        return next(iter(self.offsets)).tie

    def free(self) -> None:
        """Give back the memory of the parameters. Views of them stay, and are good again after `refill`."""
        self.params.untyped_storage().resize_(0)

    def refill(self, values: Tensor) -> None:
        """Take memory for the parameters again and write `values` [size] there.

        Neither counts as a change for autograd, which would refuse to use what it has saved of them.
        """
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(self.params):
            self.params.untyped_storage().resize_(self.size * self.params.element_size())
            self.params.copy_(values)


@dataclass(frozen=True)
class Held:
    """A piece of a parameter that this rank holds, at `run` in bucket number `bucket`.

    counted: this rank counts it in sums over the model; of those that hold it exactly one does
    """

    parameter: LocalParameter
    piece: Piece
    bucket: int
    run: slice
    counted: bool

    def view(self, buckets: Sequence[Tensor]) -> Tensor:
        """Its values [shard.shape], where every bucket has a tensor [size]."""
        return buckets[self.bucket][self.run].view(self.piece.shard.shape)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class StageBuffers:
    """The buckets of one rank's stages.

    chosen: parameters that they hold; default: all.
    zero: with True the ranks of a bucket's axis own equal slices of it, else all own everything.
    weights_only: for weights that are not trained: no main gradients.
    initial: with initial values, else zeros.
    """

    def __init__(
        self,
        context: StageContext,
        *,
        bucket_size: int,
        zero: bool,
        weights_only: bool = False,
        initial: bool = True,
        chosen: Callable[[LocalParameter], bool] = lambda parameter: True,
    ) -> None:
        self.context, self.mesh, self.weights_only = context, context.mesh, weights_only
        self.zero = zero and self.mesh.data.size > 1
        self._initial = initial
        self.buckets: list[Bucket] = []
        self._lay_out([parameter for parameter in context.parameters if chosen(parameter)], bucket_size)
        for bucket in self.buckets:
            bucket.params = torch.zeros(bucket.size, dtype=context.dtype, device=context.device)
            if not weights_only:
                bucket.grads = torch.zeros(bucket.size, dtype=context.wide_dtype, device=context.device)
            for parameter in bucket.offsets:
                self._install(parameter, bucket)

    def _lay_out(self, parameters: Sequence[LocalParameter], bucket_size: int) -> None:
        offsets: dict[LocalParameter, int] = {}
        position = size = 0
        stage = -1

        def close() -> None:
            nonlocal offsets, position, size
            axis = self.mesh.data
            whole = _round_up(position, _ALIGN * axis.size)
            share = whole // axis.size
            owned = slice(axis.index * share, (axis.index + 1) * share) if self.zero else slice(0, whole)
            self.buckets.append(Bucket(stage, axis, offsets, whole, owned))
            offsets, position, size = {}, 0, 0

        for parameter in reversed(parameters):
            tied = self.context.holders(parameter) is not None
            # Cut by `widest`, so that tensor-parallel peers cut at the same parameters however uneven their shards are:
            # a bucket's partial sums over tp are one collective. A tied parameter waits for other stages, so it gets a
            # bucket of its own and delays no other.
            if offsets and (size + parameter.widest > bucket_size or tied or stage != parameter.stage):
                close()
            stage = parameter.stage
            offsets[parameter] = position
            position = _round_up(position + parameter.numel, _ALIGN)
            size += parameter.widest
            if tied:
                close()
        if offsets:
            close()

    def _install(self, parameter: LocalParameter, bucket: Bucket) -> None:
        offset = bucket.offsets[parameter]
        place = slice(offset, offset + parameter.numel)
        view = bucket.params[place].view(parameter.shape)
        for piece in parameter.pieces:
            if isinstance(piece.record.init, Given):
                assert parameter.values is not None
                view.copy_(parameter.values.view(parameter.shape))
            elif self._initial:
                fill(piece.record, piece.shard, self.context.seed, view[piece.start : piece.stop])
        shape = parameter.shape if parameter.values is None else parameter.values.shape
        tensor = nn.Parameter(view.view(shape))
        for module, attribute in [(parameter.module, parameter.attribute), *parameter.aliases]:
            module.register_parameter(attribute, tensor)
        parameter.tensor = tensor
        if not self.weights_only:
            parameter.grad = bucket.grads[place].view(parameter.shape)
        if parameter.values is not None:
            parameter.values = None
            hook_plain_gradient(parameter, self.context.weight_grads)

    @property
    def params(self) -> list[Tensor]:
        """Those of every bucket, [size] each."""
        return [bucket.params for bucket in self.buckets]

    @property
    def grads(self) -> list[Tensor]:
        """The main gradients of every bucket, [size] each."""
        return [bucket.grads for bucket in self.buckets]

    def held(self) -> Iterator[Held]:
        """Every piece that this rank holds, in the order of the buckets."""
        for number, bucket in enumerate(self.buckets):
            for parameter, offset in bucket.offsets.items():
                row = parameter.numel // parameter.shape[0]
                holders = self.context.holders(parameter)
                first = holders is None or holders.index == 0
                for piece in parameter.pieces:
                    run = slice(offset + piece.start * row, offset + piece.stop * row)
                    yield Held(parameter, piece, number, run, first and piece.shard.counted)

    def owned_runs(self, kind: Callable[[Held], K]) -> dict[K, list[tuple[int, slice]]]:
        """(bucket, run in its owned part) of all that this rank owns, grouped by `kind`; neighbours are joined."""
        runs: dict[K, list[tuple[int, slice]]] = {}
        for held in self.held():
            owned = self.buckets[held.bucket].owned
            first, last = max(held.run.start, owned.start), min(held.run.stop, owned.stop)
            if first >= last:
                continue
            group = runs.setdefault(kind(held), [])
            run = slice(first - owned.start, last - owned.start)
            if group and group[-1][0] == held.bucket and group[-1][1].stop == run.start:
                run = slice(group.pop()[1].start, run.stop)
            group.append((held.bucket, run))
        return runs

    def gather(self, owned: Sequence[Tensor], into: Sequence[Tensor] | None = None) -> list[Tensor]:
        """From the owned part of every bucket to the whole. Collective over the buckets' axes.

        into: where the whole goes; default: fresh memory. Without ZeRO-1 it is `owned` itself.
        """
        if not self.zero:
            return list(owned)
        if into is None:
            into = [part.new_empty(bucket.size) for bucket, part in zip(self.buckets, owned, strict=True)]
        of_buckets = enumerate(zip(self.buckets, owned, into, strict=True))
        wait_for(
            [start_all_gather(f"gather of bucket {n}", one, part, bucket.axis) for n, (bucket, part, one) in of_buckets]
        )
        return list(into)

    def take_owned(self, whole: Sequence[Tensor]) -> list[Tensor]:
        """The owned part of every bucket, as views."""
        return [one[bucket.owned] for bucket, one in zip(self.buckets, whole, strict=True)]
