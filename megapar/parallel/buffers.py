"""One flat buffer of parameters and one of main gradients per rank, cut into buckets.

Parameters lie in reverse order of construction, so that buckets fill up in the order of backward; a bucket holds
parameters of one stage. Every bucket is a multiple of the data-parallel size, which makes ZeRO-1's shards equal slices.
Padding stays zero.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megapar.mesh import Mesh
from megapar.parallel.collectives import all_gather
from megapar.parallel.context import StageContext
from megapar.parallel.plain import hook_plain_gradient
from megapar.parallel.record import Given, fill
from megapar.parallel.weight_grad import LocalParameter, Piece

_ALIGN = 16  # elements: a cache line of fp32


@dataclass
class Bucket:
    """A run [start, stop) of the flat buffers whose gradients are reduced together."""

    start: int
    stop: int
    parameters: list[LocalParameter]

    @property
    def stage(self) -> int:
        return self.parameters[0].stage


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class StageBuffers:
    """The flat buffers of one rank's stages.

    params: [n] compute dtype. grads: [n] wide dtype (main gradients).
    zero: with True every data-parallel rank owns an equal slice of each bucket, else all own everything.
    weights_only: for weights that are loaded and not trained: no main gradients, no initial values (zeros).
    """

    def __init__(self, context: StageContext, *, bucket_size: int, zero: bool, weights_only: bool = False) -> None:
        self.context, self.weights_only = context, weights_only
        self.mesh: Mesh = context.mesh
        self.zero = zero and self.mesh.data.size > 1
        self.buckets: list[Bucket] = []
        self.offsets: dict[LocalParameter, int] = {}
        self._lay_out(bucket_size)
        size = self.buckets[-1].stop if self.buckets else 0
        self.params = torch.zeros(size, dtype=context.dtype, device=context.device)
        self.grads = torch.zeros(0 if weights_only else size, dtype=context.wide_dtype, device=context.device)
        for parameter in context.parameters:
            self._install(parameter)

    def _lay_out(self, bucket_size: int) -> None:
        granule = _ALIGN * self.mesh.data.size
        position = start = size = 0
        held: list[LocalParameter] = []

        def close() -> None:
            nonlocal position, start, size, held
            position = _round_up(position, granule)
            self.buckets.append(Bucket(start, position, held))
            start, size, held = position, 0, []

        for parameter in reversed(self.context.parameters):
            tied = self.waits_for_other_end(parameter)
            # Cut by `widest`, so that tensor-parallel peers cut at the same parameters however uneven their shards are:
            # a bucket's partial sums over tp are one collective. A tied parameter waits for another stage, so it gets a
            # bucket of its own and holds nobody up.
            if held and (size + parameter.widest > bucket_size or tied or held[-1].stage != parameter.stage):
                close()
            self.offsets[parameter] = position
            position = _round_up(position + parameter.numel, _ALIGN)
            size += parameter.widest
            held.append(parameter)
            if tied:
                close()
        if held:
            close()

    def _install(self, parameter: LocalParameter) -> None:
        offset = self.offsets[parameter]
        place = slice(offset, offset + parameter.numel)
        view = self.params[place].view(parameter.shape)
        for piece in parameter.pieces:
            if isinstance(piece.record.init, Given):
                assert parameter.values is not None
                view.copy_(parameter.values.view(parameter.shape))
            elif not self.weights_only:
                fill(piece.record, piece.shard, self.context.seed, view[piece.start : piece.stop])
        shape = parameter.shape if parameter.values is None else parameter.values.shape
        tensor = nn.Parameter(view.view(shape))
        for module, attribute in [(parameter.module, parameter.attribute), *parameter.aliases]:
            module.register_parameter(attribute, tensor)
        parameter.tensor = tensor
        if not self.weights_only:
            parameter.grad = self.grads[place].view(parameter.shape)
        if parameter.values is not None:
            parameter.values = None
            hook_plain_gradient(parameter, self.context.weight_grads)

    def owned(self, bucket: Bucket) -> slice:
        """The part of a bucket whose optimizer state this rank holds."""
        if not self.zero:
            return slice(bucket.start, bucket.stop)
        share = (bucket.stop - bucket.start) // self.mesh.data.size
        first = bucket.start + self.mesh.data.index * share
        return slice(first, first + share)

    def pieces(self) -> Iterator[tuple[LocalParameter, Piece, int, int]]:
        """Every piece with its run [start, stop) in the flat buffers."""
        for parameter, offset in self.offsets.items():
            row = parameter.numel // parameter.shape[0]
            for piece in parameter.pieces:
                yield parameter, piece, offset + piece.start * row, offset + piece.stop * row

    def owned_parts(self) -> list[tuple[slice, int]]:
        """The owned part of each bucket with its place in the owned buffer (bucket after bucket)."""
        parts, position = [], 0
        for bucket in self.buckets:
            part = self.owned(bucket)
            parts.append((part, position))
            position += part.stop - part.start
        return parts

    def owned_runs(self, kind: Callable[[LocalParameter, Piece], bool]) -> dict[bool, list[slice]]:
        """Runs of the owned buffer grouped by `kind(parameter, piece)`; neighbours of a kind in a bucket are joined."""
        parts = self.owned_parts()
        runs: dict[bool, list[slice]] = {}
        for parameter, piece, start, stop in self.pieces():
            group = runs.setdefault(kind(parameter, piece), [])
            for part, position in parts:
                first, last = max(start, part.start), min(stop, part.stop)
                if first >= last:
                    continue
                run = slice(position + first - part.start, position + last - part.start)
                if group and group[-1].stop == run.start > position:
                    run = slice(group.pop().start, run.stop)
                group.append(run)
        return runs

    def counted(self, parameter: LocalParameter, piece: Piece) -> bool:
        """Whether this rank counts the piece in global sums: of several holders exactly one does."""
        ends = self.context.ends
        holds_tie = piece.record.tie is None or ends is None or ends.index == 0
        return holds_tie and piece.shard.replica == 0

    def waits_for_other_end(self, parameter: LocalParameter) -> bool:
        """Whether the rank at the pipeline's other end holds a copy, whose gradient is part of the sum."""
        return self.context.ends is not None and parameter.tie is not None

    def gather(self, shards: Tensor) -> Tensor:
        """From every rank's owned values, bucket after bucket, to the whole flat buffer. Collective over dp."""
        if not self.zero:
            return shards
        whole = shards.new_empty(self.params.numel())
        for bucket, (part, position) in zip(self.buckets, self.owned_parts(), strict=True):
            share = shards[position : position + part.stop - part.start]
            whole[bucket.start : bucket.stop] = all_gather(share, self.mesh.data)
        return whole

    def take_owned(self, flat: Tensor) -> Tensor:
        """The owned values of a whole flat buffer, bucket after bucket; a view where all is owned."""
        if not self.zero:
            return flat
        return torch.cat([flat[self.owned(bucket)] for bucket in self.buckets])
