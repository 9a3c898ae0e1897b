"""What differs between the versions of torch that megapar runs on, 2.11 to 2.13: nothing else looks at a version.

Names are looked up at every call, as a test may replace or take away what it likes.
"""

from dataclasses import fields
from typing import Any

import torch.distributed as dist
from torch import Tensor


def all_gather_single(into: Tensor, x: Tensor, **options: Any) -> Any:
    """Every rank's x after another along dim 0 of `into`. options: group, async_op. torch 2.13 renamed it."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(into, x, **options)


def reduce_scatter_single(into: Tensor, x: Tensor, **options: Any) -> Any:
    """This rank's block along dim 0 of the sum of x. options: group, async_op. torch 2.13 renamed it."""
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return scatter(into, x, **options)


def default_store() -> dist.Store:
    """The store that the ranks of the default group met at; torch has no public name for it."""
    return dist.distributed_c10d._get_default_store()


def launch_config(*, shutdown_timeout: int, signals_to_handle: str, **settings: Any) -> Any:
    """torch elastic's `LaunchConfig`.

    shutdown_timeout: seconds for a rank to end when told to; torch 2.11 has 30. signals_to_handle: names of those that
    end the ranks; where torch can't be told, it takes all of its own.
    """
    from torch.distributed.launcher.api import LaunchConfig

    names = {one.name for one in fields(LaunchConfig)}
    newer: dict[str, Any] = {"shutdown_timeout": shutdown_timeout, "signals_to_handle": signals_to_handle}
    return LaunchConfig(**settings, **{name: value for name, value in newer.items() if name in names})
