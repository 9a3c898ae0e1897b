"""Matmuls with their collectives: every engine against the serial one and against fp64, forward and backward."""

import errno
import os
import re
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megapar.config.errors import UserError
from megapar.config.layout import Layout
from megapar.kernels import interprets
from megapar.kernels._common import check_overflow
from megapar.kernels.comm import exchange, segments
from megapar.kernels.comm.symmetric import SymmetricMemory
from megapar.launch.pool import WorkerPool
from megapar.mesh import Mesh
from megapar.parallel import overlap
from megapar.parallel.engines import ALIGNED, Chunked, Engine, Serial, Symmetric
from megapar.parallel.overlap import Overlap
from tests.pairwise import pairwise

Case = dict[str, Any]
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FUNCTIONS = ("copy_matmul", "matmul_all_reduce", "all_gather_matmul", "matmul_reduce_scatter")
# fewer rows than ranks or pieces (times R where rows must be divided), odd, and several rows to a piece
CASES = pairwise(
    {
        "function": FUNCTIONS,
        "ranks": [2, 3, 4],
        "dtype": ["fp64", "fp32", "bf16"],
        "rows": [1, 13, 64, 77],
        "inner": [1, 7, 48],
        "outer": [1, 5, 40],
        "pieces": [2, 3, 7],
    }
)
# less than a tile, and several; rows whose 16 bytes TMA can read, and others. to_all: how an all-reduce is done
FUSED_CASES = pairwise(
    {
        "function": FUNCTIONS,
        "ranks": [2, 3, 4],
        "dtype": ["fp32", "bf16", "fp16"],
        "rows": [1, 13, 64, 77, 150],
        "inner": [5, 48, 200],
        "outer": [3, 5, 136],
        "to_all": [True, False],
    }
)


def tensors(case: Case, rank: int) -> dict[str, Tensor]:
    """x, w and dy of a rank in fp64, of values that the case's dtype holds. What all ranks share is the same on all."""
    shared = case["function"] == "copy_matmul", case["function"] == "matmul_all_reduce"
    shares_rows = "all_gather" in case["function"], "reduce_scatter" in case["function"]
    rows = case["rows"] * (1 if case["function"] in FUNCTIONS[:2] else case["ranks"])
    share = rows // case["ranks"]

    def draw(*shape: int, of_all: bool) -> Tensor:
        seed = sum(shape) + (0 if of_all else 1000 * (rank + 1))
        made = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return made.to(DTYPES[case["dtype"]]).double()

    return {
        "x": draw(share if shares_rows[0] else rows, case["inner"], of_all=shared[0]),
        "w": draw(case["outer"], case["inner"], of_all=False),
        "dy": draw(share if shares_rows[1] else rows, case["outer"], of_all=shared[1]),
    }


def expected(case: Case, rank: int) -> list[Tensor]:
    """y, dx and dw of a rank in fp64, from all ranks' tensors in one process."""
    every = [tensors(case, peer) for peer in range(case["ranks"])]
    mine = every[rank]
    if case["function"] == "copy_matmul":
        dx = sum(one["dy"] @ one["w"] for one in every)
        return [mine["x"] @ mine["w"].t(), torch.as_tensor(dx), mine["dy"].t() @ mine["x"]]
    if case["function"] == "matmul_all_reduce":
        y = sum(one["x"] @ one["w"].t() for one in every)
        return [torch.as_tensor(y), mine["dy"] @ mine["w"], mine["dy"].t() @ mine["x"]]
    if case["function"] == "all_gather_matmul":
        x = torch.cat([one["x"] for one in every])
        dx = torch.as_tensor(sum(one["dy"] @ one["w"] for one in every))
        return [x @ mine["w"].t(), dx.chunk(case["ranks"])[rank], mine["dy"].t() @ x]
    y = torch.as_tensor(sum(one["x"] @ one["w"].t() for one in every))
    dy = torch.cat([one["dy"] for one in every])
    return [y.chunk(case["ranks"])[rank], dy @ mine["w"], dy.t() @ mine["x"]]


def outcomes(rank: int, world_size: int, cases: list[Case]) -> list[dict[str, list[Tensor]]]:
    """y, dx and dw of every case, by engine. With `to_all`: of the symmetric engine, else of the chunked."""
    mesh = Mesh(Layout(tp=world_size), rank)
    group = mesh["tp"].group
    if interprets():
        check_overflow(False)
    memory = SymmetricMemory(group, mesh.device, 60.0) if group and "to_all" in cases[0] else None
    found = []
    for case in cases:
        results = {}
        tested: Engine = Chunked(case["pieces"]) if memory is None else Symmetric(memory)
        exchange.TO_ALL_BELOW = {8: 1 << 62 if case.get("to_all") else 0}
        for name, engine in (("serial", Serial()), ("engine", tested), ("again", tested)):
            given = {key: value.to(DTYPES[case["dtype"]]) for key, value in tensors(case, rank).items()}
            x, w = given["x"].requires_grad_(), given["w"].requires_grad_()
            way = Overlap(mesh["tp"])
            way.engine = lambda *operands, engine=engine: engine  # type: ignore[method-assign]
            time.sleep(0.002 * rank)  # what is not waited for is not there yet
            y = getattr(overlap, case["function"])(x, w, way)
            results[name] = [y.detach().clone()]
            time.sleep(0.002 * rank)
            results[name] += [gradient.clone() for gradient in torch.autograd.grad(y, [x, w], given["dy"])]
        found.append(results)
    if memory is not None:
        memory.close()
    mesh.close()
    return found


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_chunked(ranks: int, pool: WorkerPool) -> None:
    """Two ranks: engines agree bit by bit, since a + b = b + a, where no rank's rows end in a part of a block that the
    matmul takes at once."""
    for _, case, where, results in compared(ranks, CASES, pool):
        if ranks == 2 and case["rows"] % ALIGNED == 0:
            assert torch.equal(results["serial"], results["engine"]), where


@pytest.mark.parametrize("ranks", [2, *(pytest.param(ranks, marks=pytest.mark.more) for ranks in (3, 4))])
def test_symmetric(ranks: int, interpreter: WorkerPool) -> None:
    """What all ranks hold alike has the same bits on all of them."""
    shared: dict[str, Tensor] = {}
    for _, case, (_, name, _), results in compared(ranks, FUSED_CASES, interpreter):
        if (name, case["function"]) in (("y", "matmul_all_reduce"), ("dx", "copy_matmul")):
            assert torch.equal(results["engine"], shared.setdefault(str(case), results["engine"])), case
    assert shared


def compared(ranks: int, cases: list[Case], pool: WorkerPool) -> Iterator[tuple[int, Case, Any, dict[str, Tensor]]]:
    """Every tensor of every rank and case by engine, after the comparison of each with fp64 and of two runs.

    Errors: a product's rounding, up to 200 terms, then of R partial sums, each rounded to the dtype before they are
    added (gloo adds bf16 in bf16). The same bits again, always.
    """
    cases = [case for case in cases if case["ranks"] == ranks]
    for rank, of_rank in enumerate(pool.run(outcomes, ranks, cases)):
        for case, found in zip(cases, of_rank, strict=True):
            exact = expected(case, rank)
            for index, name in enumerate(("y", "dx", "dw")):
                results = {engine: tensors[index] for engine, tensors in found.items()}
                where = (rank, name, case)
                assert torch.equal(results["engine"], results["again"]), where
                scale = float(exact[index].abs().max()) + 1e-3
                bound = 16 * torch.finfo(DTYPES[case["dtype"]]).eps * scale
                for one in (results["serial"], results["engine"]):
                    assert one.shape == exact[index].shape, where
                    assert float((one.double() - exact[index]).abs().max()) <= bound, where
                yield rank, case, where, results


def without_rows(rank: int, world_size: int) -> None:
    mesh = Mesh(Layout(tp=world_size), rank)
    way = Overlap(mesh["tp"])
    way.engine = lambda *operands: Chunked(2)  # type: ignore[method-assign]
    for name in FUNCTIONS:
        x, w = torch.ones(0, 8, requires_grad=True), torch.ones(3, 8, requires_grad=True)
        y = getattr(overlap, name)(x, w, way)
        assert y.shape == (0, 3)
        dx, dw = torch.autograd.grad(y, [x, w], torch.ones(0, 3))
        assert dx.shape == (0, 8) and torch.equal(dw, torch.zeros(3, 8))
    mesh.close()


def test_no_rows(pool: WorkerPool) -> None:
    pool.run(without_rows, 2)


def twice(rank: int, world_size: int) -> None:
    mesh = Mesh(Layout(tp=world_size), rank)
    for name in FUNCTIONS:
        x, w = torch.ones(2, 8, requires_grad=True), torch.ones(3, 8, requires_grad=True)
        y = getattr(overlap, name)(x, w, Overlap(mesh["tp"]))
        [first] = torch.autograd.grad(y.square().sum(), [x], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()
    mesh.close()


def test_a_second_derivative_is_refused(pool: WorkerPool) -> None:
    pool.run(twice, 2)


def refused_on_a_full_file_system(rank: int, world_size: int) -> str:
    mesh = Mesh(Layout(tp=world_size), rank)
    group = mesh["tp"].group
    assert group is not None
    engine = Symmetric(SymmetricMemory(group, mesh.device, 60.0))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    x = torch.ones(64, 64)
    before = set(os.listdir(segments.SHARED_FOLDER))
    refused = mock.patch.object(os, "posix_fallocate", side_effect=full if rank == 1 else None)
    with refused, pytest.raises(UserError) as caught:
        engine.matmul_all_reduce(x, x, mesh["tp"], lambda: None)
    dist.barrier(group)  # each rank removes its own file
    mesh.close()
    assert not {name for name in os.listdir(segments.SHARED_FOLDER) if name.startswith("megapar-")} - before
    return str(caught.value)


def test_a_full_file_system_is_refused_on_every_rank(interpreter: WorkerPool) -> None:
    for said in interpreter.run(refused_on_a_full_file_system, 2):
        assert re.fullmatch(
            r"parallel.tp_overlap=symmetric needs 0.1 MB per rank in /dev/shm, which says: No space left on device; "
            "enlarge it",
            said,
        )
