"""Prepared pairs for the tests of this folder."""

from typing import Any

import pytest

from tests.encoder_decoder.pairs import prepared


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return prepared(tmp_path_factory.mktemp("pairs"))
