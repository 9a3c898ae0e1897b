"""The package without the names that torch 2.11 has not; the launcher without them is in `tests/cli`."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

from megapar.config.layout import Layout
from megapar.config.schema import TrainConfig
from megapar.launch.pool import WorkerPool
from megapar.mesh import Mesh
from megapar.parallel.collectives import all_gather, reduce_scatter
from megapar.torch_compat import all_gather_single, reduce_scatter_single
from megapar.train.metrics import gather_figures
from megapar.train.trainer import Trainer
from tests.tiny import tiny_config

NEWER = ("all_gather_single", "reduce_scatter_single")


@contextmanager
def older(yes: bool) -> Iterator[None]:
    """torch.distributed as it was in 2.11, as far as it concerns us."""
    with pytest.MonkeyPatch.context() as patch:
        for name in NEWER if yes else ():
            patch.delattr(dist, name, raising=False)
        yield


def gathered(rank: int, world_size: int, yes: bool) -> list[list[float]]:
    """Every collective that has another name, directly and as the package calls it."""
    mesh = Mesh(Layout(tp=world_size), rank)
    axis, x = mesh["tp"], torch.arange(2.0 * world_size) + rank
    whole, block = x.new_empty(world_size * len(x)), x.new_empty(2)
    with older(yes):
        assert yes != any(hasattr(dist, name) for name in NEWER)
        all_gather_single(whole, x, group=axis.group)
        work = reduce_scatter_single(block, x, group=axis.group, async_op=True)
        work.wait()
        figures = gather_figures([float(rank)], mesh)
        return [
            part.flatten().tolist() for part in (whole, block, all_gather(x, axis), reduce_scatter(x, axis), figures)
        ]


def trained(rank: int, world_size: int, config: TrainConfig, yes: bool) -> list[float]:
    """Losses and gradient norms of two steps."""
    with older(yes):
        trainer = Trainer(config, rank)
        steps = [trainer.step(number) for number in (1, 2)]
        trainer.close()
    return [figure for step in steps for figure in (step.loss, step.result.grad_norm)]


def test_collectives_without_the_newer_names(pool: WorkerPool) -> None:
    now, before = (pool.run(gathered, 2, yes) for yes in (False, True))
    assert now == before
    assert before[1][:2] == [[0.0, 1.0, 2.0, 3.0, 1.0, 2.0, 3.0, 4.0], [5.0, 7.0]]
    assert before[0][3] == [1.0, 3.0] and before[0][4] == [0.0, 1.0]


def test_training_without_the_newer_names(pool: WorkerPool, tokens: str) -> None:
    config = tiny_config(tokens, "tp2dp2", **{"parallel.zero": 1, "parallel.sequence_parallel": True})
    now, before = (pool.run(trained, 4, config, yes) for yes in (False, True))
    assert now == before
