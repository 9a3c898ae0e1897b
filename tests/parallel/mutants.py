"""Ways to get a layout wrong, each applied in the worker processes around one run of `verify.run_layout`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from megapar import verify
from megapar.config.schema import PartOptions
from megapar.mesh import Axis
from megapar.optim.matrices import WholeMatrices
from megapar.optim.optimizer import Optimizer
from megapar.parallel import collectives, engines
from megapar.parallel.buffers import StageBuffers
from megapar.parallel.context import StageContext
from megapar.parallel.grad_sync import GradSync
from megapar.parallel.overlap import Overlap
from megapar.pipeline.executor import _Phase
from megapar.tasks.kinds.lm import LanguageModeling


class Mutant:
    """`shows`: what the verdict's first complaint must mention."""

    def __init__(
        self,
        apply: Callable[[], Any],
        shows: str,
        sequence_parallel: bool,
        values: dict[str, Any],
    ) -> None:
        self.apply, self.shows, self.sequence_parallel, self.values = apply, shows, sequence_parallel, values
        self.__name__ = apply.__name__

    def run_layout(self, rank: int, world_size: int, *args: Any) -> Any:
        with self.apply():
            return verify.run_layout(rank, world_size, *args)

    def __reduce__(self) -> tuple:
        return _by_name, (self.__name__,)


MUTANTS: list[Mutant] = []


def _by_name(name: str) -> Mutant:
    return next(mutant for mutant in MUTANTS if mutant.__name__ == name)


def mutant(shows: str, values: dict[str, Any] | None = None, *, sequence_parallel: bool = False) -> Callable:
    def register(function: Callable[[], Iterator[None]]) -> Callable:
        MUTANTS.append(Mutant(contextmanager(function), shows, sequence_parallel, values or {}))
        return function

    return register


class Alone(engines.Serial):
    """Each rank keeps its own product."""

    def matmul_all_reduce(self, x: torch.Tensor, w: torch.Tensor, axis: Axis, meanwhile: Callable[[], None]) -> Any:
        meanwhile()
        return x @ w


@contextmanager
def alone(direction: str) -> Iterator[None]:
    """No all-reduce in that direction of a matmul."""
    original = Overlap.engine

    def engine(self: Overlap, where: str, *operands: Any) -> engines.Engine:
        return Alone() if where == direction else original(self, where, *operands)

    with mock.patch.object(Overlap, "engine", engine):
        yield


@mutant("gradient")
def no_reduction_of_input_gradients() -> Iterator[None]:
    with alone("backward"):
        yield


@mutant("gradient")
def no_reduction_of_outputs() -> Iterator[None]:
    with alone("forward"):
        yield


@mutant("gradient")
def no_reduction_of_embeddings() -> Iterator[None]:
    with mock.patch.object(collectives._ReduceFromRegion, "forward", staticmethod(lambda ctx, x, axis: x.clone())):
        yield


@mutant("gradient", sequence_parallel=True)
def no_sum_of_norm_gradients_over_tp() -> Iterator[None]:
    original = GradSync._sum_axes
    with mock.patch.object(
        GradSync, "_sum_axes", lambda self, piece: original(self, piece) if piece.record.splits else []
    ):
        yield


@mutant("gradient")
def no_sum_over_replicated_heads() -> Iterator[None]:
    with mock.patch.object(GradSync, "_sum_axes", lambda self, piece: []):
        yield


@mutant("gradient")
def no_tied_sum() -> Iterator[None]:
    with mock.patch.object(GradSync, "_holders", lambda self, pending: None):
        yield


@mutant("gradient")
def bucket_reduced_twice() -> Iterator[None]:
    original = GradSync._reduce

    def twice(self: GradSync, pending: Any) -> None:
        original(self, pending)
        pending.started.wait()
        original(self, pending)

    with mock.patch.object(GradSync, "_reduce", twice):
        yield


@mutant("gradient")
def divided_by_dp_again() -> Iterator[None]:
    original = GradSync.finish

    def finish(self: GradSync, stage: int) -> None:
        original(self, stage)
        torch._foreach_div_(self.owned, self.mesh["dp"].size)

    with mock.patch.object(GradSync, "finish", finish):
        yield


@contextmanager
def counted_too(more: Callable[[Any], bool]) -> Iterator[None]:
    """These pieces are counted on every rank that holds them."""
    original = StageBuffers.held

    def held(self: StageBuffers) -> Iterator[Any]:
        for one in original(self):
            yield replace(one, counted=one.counted or more(one.piece))

    with mock.patch.object(StageBuffers, "held", held):
        yield


@mutant("gradient norm")
def replicated_head_counted_twice() -> Iterator[None]:
    with counted_too(lambda piece: any(split.blocks == 1 for split in piece.record.splits)):
        yield


@mutant("gradient norm")
def tied_copy_counted_twice() -> Iterator[None]:
    with counted_too(lambda piece: piece.record.tie is not None):
        yield


@mutant("value", {"parallel.zero": 1})
def stale_copy_of_the_parameters() -> Iterator[None]:
    original = Optimizer.publish

    def publish(self: Optimizer) -> None:
        before = [params.clone() for params in self.buffers.params]
        original(self)
        if self.buffers.mesh["dp"].index == 1:
            torch._foreach_copy_(self.buffers.params, before)

    with mock.patch.object(Optimizer, "publish", publish):
        yield


@mutant("gradient")
def stage_gradient_of_another_microbatch() -> Iterator[None]:
    original = _Phase._send

    def send(self: _Phase, action: Any) -> None:
        if action.kind == "SEND_B" and action.microbatch == 1:
            self._outgoing[action] = {name: 2 * tensor for name, tensor in self._outgoing[action].items()}
        original(self, action)

    with mock.patch.object(_Phase, "_send", send):
        yield


@mutant("gradient")
def loss_over_local_tokens() -> Iterator[None]:
    original = LanguageModeling.loss
    with mock.patch.object(
        LanguageModeling, "loss", lambda self, outputs, batch: original(self, outputs, batch) * self.mesh["dp"].size
    ):
        yield


@mutant("", {"model.dropout": 0.1}, sequence_parallel=True)
def dropout_by_local_position() -> Iterator[None]:
    with mock.patch("megapar.models.layer.HiddenDropout.forward", _local_dropout):
        yield


def _local_dropout(self: Any, x: torch.Tensor, tokens: Any, residual: torch.Tensor | None = None) -> torch.Tensor:
    from megapar.kernels.dropout import dropout

    here, site = torch.arange(x.shape[0]), (self.seed, tokens.step, self.layer, self.site)
    return dropout(x, self.rate if self.training else 0.0, here // 12, here % 12, site, residual)


@mutant("value", {"optim.name": "muon", "parallel.zero": 1})
def parts_of_matrices_made_orthogonal() -> Iterator[None]:
    def each(self: WholeMatrices, owned: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for box in (box for boxes in self.mine for box in boxes):
            box.view(owned).copy_(function(box.view(owned)))

    with mock.patch.object(WholeMatrices, "each", each):
        yield


@mutant("value", {"optim.groups": {"embedding": PartOptions(lr_scale=0.5)}})
def tied_weight_by_the_options_of_its_own_stage() -> Iterator[None]:
    original = StageContext.parameter

    def parameter(self: StageContext, *args: Any) -> Any:
        local = original(self, *args)
        local.part = self.part
        return local

    with mock.patch.object(StageContext, "parameter", parameter):
        yield


@mutant("gradient", {"model.lora.rank": 3, "model.lora.targets": ["q", "v"]})
def adapters_of_one_rank_s_outputs() -> Iterator[None]:
    with mock.patch("megapar.parallel.lora.copy_to_region", lambda x, axis: x):
        yield


@mutant("gradient", {"model.lora.rank": 3, "model.lora.targets": ["out", "down"]}, sequence_parallel=True)
def adapters_of_one_rank_s_inputs() -> Iterator[None]:
    with mock.patch("megapar.parallel.lora.reduce_scatter_tokens", lambda x, axis: x.chunk(axis.size)[axis.index]):
        yield


@mutant("gradient", {"model.lora.rank": 3}, sequence_parallel=True)
def no_sum_of_adapters_gradients_over_tokens() -> Iterator[None]:
    original = GradSync._sum_axes
    with mock.patch.object(
        GradSync, "_sum_axes", lambda self, piece: original(self, piece) if piece.record.splits else []
    ):
        yield
