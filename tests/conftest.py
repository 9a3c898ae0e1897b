"""Fixtures for every test."""

from collections.abc import Iterator

import pytest

from megapar.launch.pool import WorkerPool


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    """Eight processes for all tests that run layouts."""
    with WorkerPool(8) as pool:
        yield pool
