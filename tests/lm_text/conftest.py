"""The shipped text, prepared once."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `data.cache` for all tests."""
    return tmp_path_factory.mktemp("cache")
