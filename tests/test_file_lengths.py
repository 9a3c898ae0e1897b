"""Files are short: CONTRIBUTING.md has the limit."""

from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
FOLDERS = ("megapar", "kernels", "conf", "experiments", "tests", "docs")
MOST = 450  # lines


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_file_is_long(folder: str) -> None:
    paths = [path for path in (REPOSITORY / folder).rglob("*") if path.suffix in (".py", ".md", ".yaml", ".c")]
    assert paths
    lengths = {path.relative_to(REPOSITORY): path.read_text(encoding="utf-8").count("\n") for path in paths}
    assert {str(path): lines for path, lines in lengths.items() if lines > MOST} == {}
