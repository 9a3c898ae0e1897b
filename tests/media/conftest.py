"""Prepared samples for the tests of this folder."""

from typing import Any

import pytest

from tests.media.samples import prepared


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return prepared(tmp_path_factory.mktemp("media"))
