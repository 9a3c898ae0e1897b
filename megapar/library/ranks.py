"""Joining the ranks that torchrun has started."""

import os

import torch
import torch.distributed as dist

from megapar.config.errors import ConfigError, UserError
from megapar.config.schema import TrainConfig


def join(config: TrainConfig) -> tuple[int, bool]:
    """This process's rank in the config's layout, and whether the default process group was started for it.

    A layout of one rank needs no group. For others a group that is up is used, else one is started from torchrun's
    environment: gloo on the CPU, NCCL on GPUs. Raises UserError where there is none, or it has another size.
    """
    layout, started = config.parallel.layout, False
    if layout.world == 1:
        return 0, False
    if not dist.is_initialized():
        if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            problem = f"has {layout.world} ranks, and this is one process; start them with"
            raise ConfigError("layout", layout, f"{problem} torchrun --nproc-per-node {layout.world} SCRIPT")
        _refuse_size(config, int(os.environ["WORLD_SIZE"]))
        cuda = config.train.device == "cuda"
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        dist.init_process_group("nccl" if cuda else "gloo", timeout=config.train.timeout)
        started = True
    _refuse_size(config, dist.get_world_size())
    return dist.get_rank(), started


def _refuse_size(config: TrainConfig, ranks: int) -> None:
    layout = config.parallel.layout
    if layout.world != ranks:
        raise ConfigError("layout", layout, f"has {layout.world} ranks, and {ranks} were started; make them agree")


def refuse_part(world: int, what: str) -> None:
    """Raise UserError for what needs the whole model in one process."""
    if world > 1:
        raise UserError(f"{what}: this rank has a part of the model; it works with layout='single' alone")
