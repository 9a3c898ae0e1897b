"""What the tests of this folder look into."""

from pathlib import Path
from typing import Any

import pytest

from tests.encoder_decoder import pairs as paired
from tests.generate.conftest import make_run
from tests.media import samples


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return paired.prepared(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return samples.prepared(tmp_path_factory.mktemp("media"))


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose context is 24 tokens."""
    return make_run(tmp_path_factory.mktemp("run"), False, **{"train.seq_length": 24, "model.init_std": 0.5})
