"""Copies in the memory of several hosts: whichever is lost, the others have all. Hosts here are folders of some ranks
each."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megapar.checkpoint import hosts as hosts_module
from megapar.checkpoint import load
from megapar.checkpoint.hosts import Hosts, set_copies_folder
from megapar.config.errors import UserError
from megapar.config.schema import TrainConfig
from megapar.launch.pool import WorkerPool
from megapar.train.states import Saver
from megapar.train.trainer import Trainer
from tests.checkpoint.jobs import RankState, assemble, state_of
from tests.tiny import tiny_config

PLACES = (0, 0, 1, 2)  # each rank's host
STEP = "checkpoints/step-00000002"
FEW = 1000  # bytes that travel at a time, of files of several thousand
NEED = {0: {0, 1}, 1: {2}, 2: {2, 3}}  # of tensor-parallel copies, rank 2 has written those of rank 3
HAVE = {0: {0, 1, 3}, 1: {0, 1, 2}, 2: {2, 3}}  # whose files each has: its own ranks', and those of the one before it


def copied(rank: int, world_size: int, config: TrainConfig, folders: Sequence[str], flips: bool) -> RankState | str:
    """The state that this rank has copied, or the line with which it could not. flips: a bit of what rank 2 sends."""
    set_copies_folder(folders[rank])
    trainer = Trainer(config, rank)
    hosts = Hosts(Path(folders[rank]), trainer.mesh)
    assert (hosts.number, hosts.leads) == (list(PLACES), rank != 1)

    def isend(part: torch.Tensor, *target: Any, **more: Any) -> Any:
        part[-1] ^= 1
        return send(part, *target, **more)

    send = dist.isend
    try:
        losses = [trainer.step(step).loss for step in (1, 2)]
        flipping = mock.patch.object(dist, "isend", isend if flips and rank == 2 else send)
        with flipping, mock.patch.object(hosts_module, "CHUNK", FEW):
            Saver(Path(folders[rank]), None, hosts).save(2, trainer, config)
        return state_of(trainer, losses)
    except UserError as error:
        return str(error)
    finally:
        set_copies_folder(None)
        trainer.close()


def loaded(rank: int, world_size: int, config: TrainConfig, folders: Sequence[str]) -> RankState | str:
    """The state from copies, or the line with which they are refused."""
    set_copies_folder(folders[rank])
    trainer = Trainer(config, rank)
    try:
        with mock.patch.object(hosts_module, "CHUNK", FEW):
            assert load(Path(folders[0]) / STEP, trainer.optimizer, config).folder == Path(folders[rank]) / STEP
        return state_of(trainer, [])
    except UserError as error:
        return str(error)
    finally:
        set_copies_folder(None)
        trainer.close()


@pytest.fixture
def hosts(tmp_path: Path) -> list[Path]:
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    return folders


def of_ranks(hosts: list[Path]) -> list[str]:
    return [str(hosts[place]) for place in PLACES]


@pytest.fixture
def config(tokens: str) -> Callable[[str], TrainConfig]:
    return lambda layout: tiny_config(tokens, layout, **{"parallel.zero": 1, "train.micro_batch_size": 1})


def shards(host: Path) -> set[int]:
    return {int(path.stem.removeprefix("rank-")) for path in (host / STEP).glob("rank-*")}


@pytest.mark.parametrize("lost", [0, 1, 2])
@pytest.mark.parametrize("layout", ["tp2dp2", "pp2dp2"])
def test_whichever_host_is_lost_the_others_have_all(
    pool: WorkerPool, hosts: list[Path], config: Callable[[str], TrainConfig], lost: int, layout: str
) -> None:
    """In the layout of the copies, a host gets what its own ranks read and no more; another one reads other files."""
    before = pool.run(copied, 4, config("tp2dp2"), of_ranks(hosts), False)
    assert {host: shards(path) for host, path in enumerate(hosts)} == HAVE
    manifest = (hosts[1] / STEP / "manifest.json").read_bytes()
    assert all((path / STEP / "manifest.json").read_bytes() == manifest for path in hosts)
    shutil.rmtree(hosts[lost] / "checkpoints")
    if lost == 0:  # its launcher gets the manifest from another's
        (hosts[0] / STEP).mkdir(parents=True)
        (hosts[0] / STEP / "manifest.json").write_bytes(manifest)
    after = pool.run(loaded, 4, config(layout), of_ranks(hosts))
    whole, found = assemble(before), assemble(after)
    assert whole.keys() == found.keys()
    assert all(np.array_equal(whole[name], found[name]) for name in whole)
    if layout == "tp2dp2":
        assert shards(hosts[lost]) == NEED[lost]


def test_what_no_host_has_is_named(pool: WorkerPool, hosts: list[Path], config: Callable[[str], TrainConfig]) -> None:
    """Rank 2's file is on hosts 1 and 2; damaged there counts as lost. With one of them good it is read."""
    pool.run(copied, 4, config("tp2dp2"), of_ranks(hosts), False)
    name = f"{STEP}/rank-00002.safetensors"
    good = (hosts[1] / name).read_bytes()
    (hosts[1] / name).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert all(isinstance(one, RankState) for one in pool.run(loaded, 4, config("tp2dp2"), of_ranks(hosts)))
    assert (hosts[1] / name).read_bytes() == good
    for host in (1, 2):
        (hosts[host] / name).unlink()
    for line in pool.run(loaded, 4, config("tp2dp2"), of_ranks(hosts)):
        assert line.endswith(f"{name}: on no host as it was written; use another checkpoint"), line


def test_what_arrives_changed_is_no_copy(
    pool: WorkerPool, hosts: list[Path], config: Callable[[str], TrainConfig]
) -> None:
    found = pool.run(copied, 4, config("tp2dp2"), of_ranks(hosts), True)
    for line in found:
        assert (
            "rank-00002.safetensors: changed, its SHA-256 is not the one in the manifest, on its way from rank 2"
            in line
        )
    assert not any(list((host / "checkpoints").iterdir()) for host in hosts)
