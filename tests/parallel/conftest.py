"""Token files for the tests of this folder."""

import pytest

from tests.tiny import write_tokens


@pytest.fixture(scope="session")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("tokens"))
