"""Plans that are wrong in one place, made at `torch.distributed` and knowing nothing of who calls it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist


@contextmanager
def all_reduce_dropped() -> Iterator[None]:
    """The second of a rank's all-reduces that are waited for at once does not take place."""
    original, count = dist.all_reduce, [0]

    def all_reduce(*args: Any, **kwargs: Any) -> Any:
        count[0] += not kwargs.get("async_op")
        return None if count[0] == 2 and not kwargs.get("async_op") else original(*args, **kwargs)

    with mock.patch.object(dist, "all_reduce", all_reduce):
        yield


@contextmanager
def transfers_swapped() -> Iterator[None]:
    """The first message of a rank leaves after the second one."""
    original, held = dist.isend, list[Callable[[], Any]]()
    count = [0]

    def isend(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == 1:
            held.append(lambda: original(*args, **kwargs))
            return mock.Mock(is_completed=lambda: False)
        work = original(*args, **kwargs)
        while held:
            held.pop()()
        return work

    with mock.patch.object(dist, "isend", isend):
        yield


MUTANTS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "all_reduce_dropped": all_reduce_dropped,
    "transfers_swapped": transfers_swapped,
}
