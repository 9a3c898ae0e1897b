"""Processes whose kernels run in Triton's interpreter, as ranks that share memory."""

from collections.abc import Iterator

import pytest

from megapar.kernels import has_triton
from megapar.launch.pool import WorkerPool

collect_ignore_glob = [] if has_triton() else ["*"]


@pytest.fixture(scope="session")
def ranks() -> Iterator[WorkerPool]:
    """Three ranks."""
    with WorkerPool(3, interpret=True) as pool:
        yield pool


@pytest.fixture(scope="session")
def more_ranks() -> Iterator[WorkerPool]:
    """Three more, for jobs that sleep most of their time and so can run beside others."""
    with WorkerPool(3, interpret=True) as pool:
        yield pool
