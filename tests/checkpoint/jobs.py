"""What the pool's ranks do in the checkpoint tests."""

import os
import resource
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from megapar.checkpoint import load, save
from megapar.config.errors import UserError
from megapar.config.schema import TrainConfig
from megapar.parallel.boxes import Box, owned_boxes
from megapar.train.trainer import Trainer


@dataclass
class RankState:
    """owned: optimizer state by kind and name, in boxes; parameters: all that the rank computes with, copies too."""

    owned: list[tuple[str, str, Box, np.ndarray]]
    parameters: list[tuple[str, tuple[slice, ...], np.ndarray]]
    steps: int
    losses: list[float]


def state_of(trainer: Trainer, losses: list[float]) -> RankState:
    buffers, state = trainer.buffers, trainer.optimizer.state()
    owned = [
        (kind, one.record.name, one.box, values.double().numpy().copy())
        for one in owned_boxes(buffers)
        for kind, parts in state.items()
        if (values := one.part_of(parts)) is not None
    ]
    parameters = [
        (held.piece.record.name, held.piece.shard.box, held.view(buffers.params).double().numpy().copy())
        for held in buffers.held()
    ]
    return RankState(owned, parameters, trainer.optimizer.steps, losses)


def run(
    rank: int,
    world_size: int,
    config: TrainConfig,
    steps: int,
    load_from: str | None = None,
    save_to: str | None = None,
) -> RankState:
    """Load if asked, train up to step `steps`, save if asked; returns the state."""
    trainer = Trainer(config, rank)
    first, losses = 1, []
    if load_from is not None:
        resumed = load(load_from, trainer.optimizer, config)
        assert resumed.samples == resumed.step * config.train.global_batch_size
        first = resumed.step + 1
    for step in range(first, steps + 1):
        losses.append(trainer.step(step).loss)
    if save_to is not None:
        save(Path(save_to), trainer.optimizer, config, steps)
    state = state_of(trainer, losses)
    trainer.close()
    return state


def refused(rank: int, world_size: int, config: TrainConfig, load_from: str) -> str:
    """The line with which loading is refused."""
    trainer = Trainer(config, rank)
    try:
        load(load_from, trainer.optimizer, config)
    except UserError as error:
        return str(error)
    finally:
        trainer.close()
    return "not refused"


def save_with_full_disk(rank: int, world_size: int, config: TrainConfig, folder: str, rank_at_fault: int) -> str:
    """The line with which saving is refused where one rank may write no file of more than a few bytes."""
    trainer = Trainer(config, rank)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == rank_at_fault:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        save(Path(folder), trainer.optimizer, config, 4)
    except UserError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        trainer.close()
    return "not refused"


def die_before_rename(rank: int, world_size: int, config: TrainConfig, folder: str) -> None:
    """Save, but die when all is written and only the final name is missing."""
    trainer = Trainer(config, rank)
    with mock.patch("os.rename", lambda *names: os._exit(9)):
        save(Path(folder), trainer.optimizer, config, 4)


def assemble(ranks: list[RankState]) -> dict[str, np.ndarray]:
    """The logical state from what all ranks own. Whatever two of them own is the same bits, and nothing is missing."""
    sizes: dict[str, tuple[int, ...]] = {}
    for kind, name, box, _ in (one for rank in ranks for one in rank.owned):
        end = tuple(a + b for a, b in zip(box.offset, box.shape, strict=True))
        known = sizes.get(f"{kind}/{name}", end)
        sizes[f"{kind}/{name}"] = tuple(max(a, b) for a, b in zip(known, end, strict=True))
    whole = {name: np.full(shape, np.nan) for name, shape in sizes.items()}
    for kind, name, box, values in (one for rank in ranks for one in rank.owned):
        part = whole[f"{kind}/{name}"][box.within(Box((0,) * len(box.shape), box.shape))]
        assert np.all(np.isnan(part) | (part == values)), f"{kind} of {name} differs between its owners"
        part[...] = values
    assert not any(np.isnan(values).any() for values in whole.values())
    return whole


def check_parameters(ranks: list[RankState], whole: dict[str, np.ndarray], dtype: torch.dtype) -> None:
    """Every copy of every parameter is the master weight in the compute dtype."""
    for name, place, values in (one for rank in ranks for one in rank.parameters):
        expected = torch.from_numpy(whole[f"weight/{name}"]).to(dtype).double().numpy()
        np.testing.assert_array_equal(values, expected[place], err_msg=name)
