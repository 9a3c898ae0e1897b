"""Gradients in fewer bytes: what is lost, that it comes back, that copies stay equal, and how many bytes were sent."""

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megapar.config.layout import Layout
from megapar.config.schema import TrainConfig
from megapar.launch.pool import WorkerPool
from megapar.mesh import Mesh
from megapar.parallel.compression import BLOCK, Int8, Matrix, gaps, reduction
from megapar.train.trainer import Trainer
from tests.tiny import tiny_config

METHODS = ("none", "bf16", "int8_ef", "powersgd")
SIZE = 64 * 48 + 1024 + 40 * 20 + 96  # two matrices of low rank with a gap between and behind them
MATRICES = [Matrix(0, 64, 48), Matrix(64 * 48 + 1024, 40, 20)]
STEPS = 24


def gradient(rank: int) -> Tensor:
    """Each rank's matrices are products of one factor of its own with one that all share: their sum is of rank 2."""
    shared, own = torch.Generator().manual_seed(99), torch.Generator().manual_seed(rank)
    flat = torch.randn(SIZE, generator=own)
    for one in MATRICES:
        right = torch.randn(2, one.columns, generator=shared)
        flat[one.start : one.stop] = (torch.randn(one.rows, 2, generator=own) @ right).flatten()
    return flat


class Traffic:
    """Counts what a rank hands to its peers, by the sizes of a ring's collectives."""

    def __init__(self, ranks: int) -> None:
        self.ranks, self.sent = ranks, 0

    def counting(self, name: str) -> Any:
        real = getattr(dist, name)

        def collective(*tensors: Any, **options: Any) -> Any:
            given = tensors[-1]
            size = given.numel() * given.element_size()
            ways = {"all_reduce": 2 * (self.ranks - 1) / self.ranks, "all_gather_single": self.ranks - 1}
            self.sent += round(size * ways.get(name, (self.ranks - 1) / self.ranks))
            return real(*tensors, **options)

        return mock.patch.object(dist, name, collective)


def reduced(rank: int, world_size: int, method: str, zero: bool) -> tuple[list[Tensor], int, int]:
    """The sums of STEPS equal steps, the bytes that the reduction says it sent, and those that were counted."""
    mesh = Mesh(Layout(dp=world_size), rank)
    one = reduction(method, mesh["dp"], MATRICES, SIZE, rank=2)
    traffic, sums = Traffic(world_size), []
    with traffic.counting("all_reduce"), traffic.counting("all_to_all_single"), traffic.counting("all_gather_single"):
        for _ in range(STEPS):
            flat = gradient(rank)
            into = torch.empty(SIZE // world_size) if zero else flat
            one.start("reduction", flat, into).wait()
            sums.append(into.clone())
    mesh.close()
    return sums, one.sent, traffic.sent


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_sums(method: str, zero: bool, ranks: int, pool: WorkerPool) -> None:
    found = pool.run(reduced, ranks, method, zero)
    exact = torch.stack([gradient(rank).double() for rank in range(ranks)]).sum(0)
    sums = [torch.cat([of_rank[0][step] for of_rank in found]) if zero else found[0][0][step] for step in range(STEPS)]
    if not zero:
        for of_rank in found:
            for ours, first in zip(of_rank[0], sums, strict=True):
                assert torch.equal(ours, first)  # the same bits on every rank
    largest = torch.stack([gradient(rank).abs() for rank in range(ranks)]).max()
    # summands and their sum are rounded: 2^-8 of each in bf16, half of the largest / 127 in 8 bits; fp32 else
    bound = {"bf16": 2.0**-8 * (2 * ranks), "int8_ef": 0.5 / 127 * (2 * ranks)}.get(method, 1e-5) * float(largest)
    if method != "int8_ef":  # whose error feedback adds what earlier steps dropped
        assert all(float((one - exact).abs().max()) <= bound for one in sums)
    # With error feedback the mean over steps comes as near as one step's error by their number.
    mean = torch.stack(sums).double().mean(0)
    assert float((mean - exact).abs().max()) <= bound / (STEPS / 2 if method == "int8_ef" else 1)
    for _, said, counted in found:
        assert said == pytest.approx(counted, rel=1e-3)
    ways = 1 if zero else 2
    exactly, factors = SIZE - 64 * 48 - 40 * 20, 2 * (64 + 48 + 40 + 20)
    expected = {
        "none": ways * 4 * SIZE,
        "bf16": ways * 2 * SIZE + 2 * 4 * exactly,
        "int8_ef": ways * (SIZE + 4 * SIZE / BLOCK) + 2 * 4 * exactly,
        "powersgd": 2 * 4 * (factors + exactly),
    }[method]
    padding = ways * ranks * BLOCK if method == "int8_ef" else 0
    assert found[0][1] / STEPS == pytest.approx(expected * (ranks - 1) / ranks, abs=8 + padding)


def test_a_rank_too_low_comes_back_later(pool: WorkerPool) -> None:
    """powersgd of rank 2 on matrices of full rank: a step loses much, the mean over steps little."""
    errors = pool.run(full_rank, 2)[0]
    assert errors[-1] < 0.35 * errors[0]
    assert errors[0] > 0.5  # two of forty-eight directions are a small part


def full_rank(rank: int, world_size: int) -> list[float]:
    """Relative error of the mean over the first 1, 2, ... steps."""
    mesh = Mesh(Layout(dp=world_size), rank)
    one = reduction("powersgd", mesh["dp"], MATRICES[:1], 64 * 48, rank=2)
    given = [torch.randn(64 * 48, generator=torch.Generator().manual_seed(peer)) for peer in range(world_size)]
    exact, total, errors = torch.stack(given).sum(0), torch.zeros(64 * 48), []
    for step in range(1, 101):
        flat = given[rank].clone()
        one.start("reduction", flat, flat).wait()
        total += flat
        errors.append(float((total / step - exact).norm() / exact.norm()))
    mesh.close()
    return errors


def without_matrices(rank: int, world_size: int) -> None:
    mesh = Mesh(Layout(dp=world_size), rank)
    one = reduction("powersgd", mesh["dp"], MATRICES, SIZE, rank=1000)
    for _ in range(2):
        flat = torch.ones(SIZE)
        one.start("reduction", flat, flat).wait()
        assert torch.equal(flat, torch.full((SIZE,), float(world_size)))
    mesh.close()


def test_no_matrix_is_worth_factors(pool: WorkerPool) -> None:
    pool.run(without_matrices, 2)


def after_an_infinite_gradient(rank: int, world_size: int, config: TrainConfig) -> list[bool]:
    """Which steps were skipped. The second has an infinite gradient on rank 0."""
    trainer = Trainer(config, rank)
    real, skipped = trainer.sync._reduce, []

    def reduce(pending: Any) -> None:
        pending.bucket.grads[0] = torch.inf
        real(pending)

    for step in (1, 2, 3, 4):
        trainer.sync._reduce = reduce if (rank, step) == (0, 2) else real  # type: ignore[method-assign]
        skipped.append(trainer.step(step).result.skipped)
    trainer.close()
    return skipped


@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("method", METHODS)
def test_a_skipped_step_leaves_nothing_behind(method: str, zero: int, pool: WorkerPool, prefix: str) -> None:
    values: dict[str, Any] = {"parallel.zero": zero, "train.dtype": "fp32", "parallel.grad_compression": method}
    for skipped in pool.run(after_an_infinite_gradient, 2, tiny_config(prefix, "dp2", **values)):
        assert skipped == [False, True, False, False]


def around_a_skipped_step(rank: int, world_size: int, method: str, zero: bool, skipped: int) -> bool:
    """Whether sums are the same with and without a step before number `skipped` whose sum is not finite."""
    mesh, sums = Mesh(Layout(dp=world_size), rank), []
    for with_it in (True, False):
        one, found = reduction(method, mesh["dp"], MATRICES, SIZE, rank=2), []
        for step in range(4):
            for bad in (True, False) if with_it and step == skipped else (False,):
                flat = gradient(rank) * (step + 1)
                flat[5] = torch.inf if bad and rank == 0 else flat[5]
                into = torch.empty(SIZE // world_size) if zero else flat
                one.start("reduction", flat, into).wait()
                one.keep_if(torch.tensor([not bad]))
            found.append(into.clone())
        sums.append(torch.stack(found))
    mesh.close()
    return bool(sums[0].isfinite().all()) and torch.equal(*sums)


@pytest.mark.parametrize("skipped", [0, 2])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_skipped_step_leaves_the_error_feedback_as_it_was(
    method: str, zero: bool, skipped: int, pool: WorkerPool
) -> None:
    assert all(pool.run(around_a_skipped_step, 2, method, zero, skipped))


def test_8_bits_of_odd_lengths_and_zeros() -> None:
    for length in (1, BLOCK - 1, BLOCK, BLOCK + 1, 1000):
        x = torch.randn(3, length)
        x[1] = 0.0
        back = Int8.decode(Int8.encode(x), length)
        assert back.shape == x.shape and torch.equal(back[1], x[1])
        assert float((back - x).abs().max()) <= float(x.abs().max()) / 127 / 2 * 1.001


def test_what_is_in_no_matrix_is_found() -> None:
    assert gaps([Matrix(10, 2, 5), Matrix(0, 1, 4)], 25) == [slice(4, 10), slice(20, 25)]
    assert gaps([Matrix(0, 5, 5)], 25) == []
    assert gaps([], 25) == [slice(0, 25)]


def trained(rank: int, world_size: int, config: TrainConfig) -> tuple[list[float], dict[str, Tensor]]:
    """Losses, and the weights that every rank of a stage holds alike."""
    trainer = Trainer(config, rank)
    losses = [trainer.step(step).loss for step in range(1, config.train.steps + 1)]
    shared = {}
    for parameter in trainer.context.parameters:
        for piece in parameter.pieces:
            if not piece.shard.unique or not piece.record.splits:
                shared[piece.record.name] = parameter.tensor[piece.start : piece.stop].detach().clone()
    trainer.close()
    return losses, shared


@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("method", METHODS[1:])
def test_a_model_trains_and_copies_stay_equal(method: str, zero: int, pool: WorkerPool, prefix: str) -> None:
    """Also where shards are uneven (the vocabulary), heads are replicated and embeddings tied."""
    values: dict[str, Any] = {
        "parallel.zero": zero,
        "parallel.sequence_parallel": True,
        "model.kv_heads": 1,
        "model.tied": True,
    }
    values |= {"parallel.bucket_size": 2000, "train.steps": 6, "train.dtype": "fp32", "optim.lr": 3e-3}
    exact, other = (
        pool.run(trained, 4, tiny_config(prefix, "tp2dp2", **values, **{"parallel.grad_compression": name}))
        for name in ("none", method)
    )
    for _, shared in other:
        assert shared.keys() == other[0][1].keys() and len(shared) > 4
        assert all(torch.equal(shared[name], other[0][1][name]) for name in shared)
    losses = [[sum(of_rank[0][step] for of_rank in run) for step in range(6)] for run in (exact, other)]
    assert losses[1] != losses[0]
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)  # random tokens: losses differ by 5% between samples
