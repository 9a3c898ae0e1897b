"""Fixtures for every test."""

from collections.abc import Iterator

import pytest

from megapar.launch.pool import WorkerPool
from tests.tiny import write_tokens


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    """Eight processes for all tests that run layouts."""
    with WorkerPool(8) as pool:
        yield pool


@pytest.fixture(scope="session")
def interpreter() -> Iterator[WorkerPool]:
    """Four processes whose Triton kernels run in Triton's interpreter, which is fixed when a process imports them."""
    with WorkerPool(4, interpret=True) as pool:
        yield pool


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> str:
    """PREFIX of the tiny model's token files."""
    return write_tokens(tmp_path_factory.mktemp("tokens"))
